"""16-bit inputs with the default, refined solver against the exact float64 solve, on four input families."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, family_inputs
from helpers import assert_close, run


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_against_exact(name: str) -> None:
    inputs = family_inputs(FAMILIES[name])
    ones = torch.ones(inputs["g"].shape)
    out = run({**inputs, "alpha": ones, "beta": ones})
    exact = run({n: x.double() for n, x in {**inputs, "alpha": ones, "beta": ones}.items()}, steps=(200,))
    assert_close({"o": out["o"]}, {"o": exact["o"]}, 5e-3, name)
    grads = [n for n in out if n.startswith("d")]
    assert len(grads) == 6
    assert_close({n: out[n] for n in grads}, {n: exact[n] for n in grads}, 2e-2, name)
