"""Recording a CUDA graph, such that an error while recording leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

_ALONE = threading.Lock()  # PyTorch records one graph at a time


@contextmanager
def recording(graph: Any, stream: torch.cuda.Stream, pool: Any = None) -> Iterator[None]:
    """Record what is launched inside; nothing of it runs.

    Other threads may use the GPU meanwhile, but not its random numbers.

    Args:
        graph: a new `torch.cuda.CUDAGraph`.
        stream: the stream of the recording, on the GPU of the graph; not the default stream.
        pool: memory that the graph shares with others, from `torch.cuda.graph_pool_handle`; None for its own.

    Raises:
        RuntimeError: what was launched cannot be recorded, e.g. since it waits for the GPU. The current stream is
            then the one from before, and random numbers work as before.
    """
    device, own = stream.device, {} if pool is None else {"pool": pool}
    with _ALONE, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local", **own):
                yield
        except BaseException:
            with suppress(RuntimeError):
                _record_something(device)
            raise


def _record_something(device: torch.device) -> None:
    """After a recording that failed, PyTorch (2.11) still takes every random number for one of a recording.

    Each use is then an error, until another recording succeeds.
    """
    place = torch.empty(1, device=device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
        place.zero_()
