"""The inputs of the op in every layer of a model, recorded while the model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gka.nn.layer
from gka.ops import gated_kalmanet

INPUTS = ("q", "k", "v", "g", "alpha", "beta")


@contextlib.contextmanager
def recorded() -> Iterator[list[dict[str, Any]]]:
    """Collect the inputs of the op in every layer."""
    calls: list[dict[str, Any]] = []

    def op(*tensors: Any, **options: Any) -> Any:
        calls.append({**dict(zip(INPUTS, tensors, strict=True)), "ridge_ratio": options["ridge_ratio"]})
        return gated_kalmanet(*tensors, **options)

    gka.nn.layer.gated_kalmanet = op
    try:
        yield calls
    finally:
        gka.nn.layer.gated_kalmanet = gated_kalmanet
