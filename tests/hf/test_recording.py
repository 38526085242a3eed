"""A recording that fails is followed by one that succeeds; on a GPU, random numbers work after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gka.hf.recording import recording


class StubGPU:
    """Stands in for `torch.cuda` and writes down what is recorded; recording number `fails` fails at its end."""

    def __init__(self, fails: int | str | None) -> None:
        self.fails, self.log = fails, list[tuple[Any, ...]]()
        self.current = "the caller's"

    def CUDAGraph(self) -> object:
        return object()

    def Stream(self, device: torch.device) -> Any:
        return SimpleNamespace(device=device, name="a new one")

    def device(self, device: torch.device) -> Any:
        return nullcontext()

    def current_stream(self, device: torch.device) -> str:
        return self.current

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        try:
            yield
        finally:
            self.current = stream

    @contextmanager
    def graph(self, graph: object, stream: Any, capture_error_mode: str, **options: Any) -> Iterator[None]:
        self.current = stream.name  # stays the current one after an error, as PyTorch leaves it
        self.log.append((stream.name, options))
        yield
        if self.fails in (len(self.log) - 1, "always"):
            raise RuntimeError("operation failed due to a previous error during capture")
        self.current = "the caller's"


@pytest.mark.parametrize("fails", [None, 0, "always"])
def test_another_recording_follows_one_that_fails(fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = StubGPU(fails)
    monkeypatch.setattr(torch, "cuda", gpu)
    stream: Any = SimpleNamespace(device=torch.device("cpu"), name="given")
    told = pytest.warns(UserWarning, match="may fail") if fails == "always" else nullcontext()
    with told, nullcontext() if fails is None else pytest.raises(RuntimeError, match="previous error"):
        with recording(gpu.CUDAGraph(), stream, "some memory"):  # type: ignore[arg-type]
            pass
    again = [] if fails is None else [("a new one", {})]
    assert gpu.log == [("given", {"pool": "some memory"}), *again]
    assert gpu.current == "the caller's"


@pytest.mark.gpu
def test_random_numbers_work_after_an_error(device: torch.device) -> None:
    x = torch.ones(3, device=device)
    with pytest.raises(RuntimeError):
        with recording(torch.cuda.CUDAGraph(), torch.cuda.Stream(device)):
            torch.rand(3, device=device)
            x.sum().item()
    assert torch.rand(3, device=device).isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with recording(graph, torch.cuda.Stream(device)):
        y = 2 * x
    graph.replay()
    assert torch.equal(y, 2 * x)
