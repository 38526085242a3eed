"""A GPU that runs the op in PyTorch says so once, and what would be fast."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gka.ops import backends, checks
from gka.ops.torch import step
from gka.ops.triton import config
from gka.ops.triton import step as triton_step
from gka.ops.types import Arguments


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that kernels run on, and nothing said so far."""
    monkeypatch.setattr(backends, "runs_kernels", lambda _: True)
    monkeypatch.setattr(checks, "_told_slow", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def on_gpu(dtype: torch.dtype, *shape: int) -> Any:
    """What the choice of a backend sees of q."""
    return SimpleNamespace(device=torch.device("cuda:0"), dtype=dtype, shape=shape, requires_grad=False)


def chosen(q: Any, chunk_size: int | None) -> str:
    return backends.backend_for(call(q, chunk_size), None)


def call(q: Any, chunk_size: int | None = None, k: Any = None) -> Arguments:
    """A call of the op or of a step with this q; nothing else counts but whether k asks for a gradient."""
    others: list[Any] = [k, *7 * [None]]
    return Arguments(
        q, *others, ridge_ratio=0.02, solver_steps=(31,), scale=1.0, normalize_qk=False, chunk_size=chunk_size
    )


@pytest.mark.parametrize(
    ("dtype", "D", "chunk_size"),
    [(torch.bfloat16, 130, None), (torch.float32, 80, None), (torch.float64, 8, None), (torch.bfloat16, 64, 48)],
)
def test_the_op_warns_once(dtype: torch.dtype, D: int, chunk_size: int | None) -> None:
    q = on_gpu(dtype, 2, 5, 3, D)
    with pytest.warns(
        UserWarning,
        match=rf"slower.*{dtype}, D = {D}, chunk_size = {chunk_size}; fast are bfloat16 or float16 with D",
    ):
        assert chosen(q, chunk_size) == "chunked"
    assert chosen(q, chunk_size) == "chunked"  # a second warning would be an error
    with pytest.warns(UserWarning, match=f"D = {D + 70}"):
        chosen(on_gpu(dtype, 2, 5, 3, D + 70), chunk_size)


@pytest.mark.parametrize(
    ("half", "words"),
    [
        (64, "bfloat16 with D up to 128, float16 or float32 with D up to 64"),
        (128, "bfloat16 or float16 with D up to 128, float32 with D up to 64"),
    ],
)
def test_what_is_fast_is_read_from_the_table(half: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And everything that the words promise has kernels."""
    table = {torch.bfloat16: 128, torch.float16: half, torch.float32: 64}
    monkeypatch.setattr(config, "MAX_DIM", table)
    with pytest.warns(UserWarning, match=f"fast are {words}, chunk_size None or"):
        chosen(on_gpu(torch.float16, 2, 5, 3, 200), None)
    for dtype, D in table.items():
        assert chosen(on_gpu(dtype, 2, 5, 3, D), None) == "triton"


def test_what_is_fast_is_not_warned_of() -> None:
    assert chosen(on_gpu(torch.bfloat16, 2, 5, 3, 128), None) == "triton"
    assert chosen(torch.zeros(2, 5, 3, 200), None) == "chunked"  # on the CPU


def test_a_step_warns_once_but_not_for_gradients() -> None:
    q = on_gpu(torch.float16, 2, 3, 200)
    trained = torch.zeros(1, requires_grad=True)
    assert backends.step_backend_for(call(q, k=trained)) is step.gated_kalmanet_step
    with pytest.warns(UserWarning, match=r"gated_kalmanet_step .*D = 200.*fast are .*D up to 128"):
        assert backends.step_backend_for(call(q)) is step.gated_kalmanet_step
    assert backends.step_backend_for(call(q)) is step.gated_kalmanet_step
    small = call(on_gpu(torch.float32, 2, 3, 128))
    assert backends.step_backend_for(small) is triton_step.gated_kalmanet_step


def test_a_gpu_without_kernels_is_told_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "runs_kernels", lambda _: False)
    with pytest.warns(UserWarning, match=r"Triton and an NVIDIA GPU of compute capability 8\.0"):
        assert chosen(on_gpu(torch.bfloat16, 2, 5, 3, 64), None) == "chunked"


def test_compiled_code_warns_and_stays_one_graph() -> None:
    def choose(x: torch.Tensor) -> torch.Tensor:
        checks.warn_slow("gated_kalmanet", torch.float32, 200)
        return x + 1

    warnings.simplefilter("always")  # PyTorch's own are no errors here
    with pytest.warns(UserWarning, match="D = 200"):
        torch.compile(choose, fullgraph=True, backend="eager")(torch.zeros(2))
