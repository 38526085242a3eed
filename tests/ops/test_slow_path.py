"""A GPU that runs the op in PyTorch says so once, and what would be fast."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gka.ops import api, checks
from gka.ops.torch import step
from gka.ops.triton import step as triton_step


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that kernels run on, and nothing said so far."""
    monkeypatch.setattr(api, "runs_kernels", lambda _: True)
    monkeypatch.setattr(checks, "_told_slow", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def on_gpu(dtype: torch.dtype, *shape: int) -> Any:
    """What the choice of a backend sees of q."""
    return SimpleNamespace(device=torch.device("cuda:0"), dtype=dtype, shape=shape)


@pytest.mark.parametrize(
    ("dtype", "D", "chunk_size"),
    [(torch.bfloat16, 130, None), (torch.float32, 80, None), (torch.float64, 8, None), (torch.bfloat16, 64, 48)],
)
def test_the_op_warns_once(dtype: torch.dtype, D: int, chunk_size: int | None) -> None:
    q = on_gpu(dtype, 2, 5, 3, D)
    with pytest.warns(
        UserWarning, match=rf"slower.*{dtype}, D = {D}, chunk_size = {chunk_size}; fast are bfloat16 with D"
    ):
        assert api._suitable_backend(q, chunk_size) == "chunked"
    assert api._suitable_backend(q, chunk_size) == "chunked"  # a second warning would be an error
    with pytest.warns(UserWarning, match=f"D = {D + 70}"):
        api._suitable_backend(on_gpu(dtype, 2, 5, 3, D + 70), chunk_size)


def test_what_is_fast_is_not_warned_of() -> None:
    assert api._suitable_backend(on_gpu(torch.bfloat16, 2, 5, 3, 128), None) == "triton"
    assert api._suitable_backend(torch.zeros(2, 5, 3, 200), None) == "chunked"  # on the CPU


def test_a_step_warns_once_but_not_for_gradients() -> None:
    q = on_gpu(torch.float16, 2, 3, 200)
    assert api._step_backend(q, differentiable=True) is step
    with pytest.warns(UserWarning, match=r"gated_kalmanet_step .*D = 200.*fast are .*D up to 128"):
        assert api._step_backend(q, differentiable=False) is step
    assert api._step_backend(q, differentiable=False) is step
    assert api._step_backend(on_gpu(torch.float32, 2, 3, 128), differentiable=False) is triton_step


def test_a_gpu_without_kernels_is_told_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "runs_kernels", lambda _: False)
    with pytest.warns(UserWarning, match=r"Triton and an NVIDIA GPU of compute capability 8\.0"):
        assert api._suitable_backend(on_gpu(torch.bfloat16, 2, 5, 3, 64), None) == "chunked"


def test_compiled_code_warns_and_stays_one_graph() -> None:
    def choose(x: torch.Tensor) -> torch.Tensor:
        checks.warn_slow("gated_kalmanet", torch.float32, 200)
        return x + 1

    warnings.simplefilter("always")  # PyTorch's own are no errors here
    with pytest.warns(UserWarning, match="D = 200"):
        torch.compile(choose, fullgraph=True, backend="eager")(torch.zeros(2))
