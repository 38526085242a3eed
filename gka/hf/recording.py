"""Recording a CUDA graph; after an error, the current stream and random numbers are as before.

What PyTorch keeps after an error up to version 2.11 is the memory of the recording, and from then on
`torch.cuda.empty_cache` does nothing (pytorch#180395 mends it).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_RECORDING_LOCK = threading.RLock()  # PyTorch records one graph at a time


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> Iterator[None]:
    """Record what is launched inside; nothing of it runs.

    Other threads may use the GPU meanwhile, but random numbers on it are an error for them.

    Args:
        graph: a new `torch.cuda.CUDAGraph`.
        stream: the stream of the recording, on the GPU of the graph; not the default stream.
        pool: memory that the graph shares with others, from `torch.cuda.graph_pool_handle`; None for its own.

    Raises:
        RuntimeError: what was launched cannot be recorded, e.g. since it waits for the GPU.
    """
    device, own = stream.device, {} if pool is None else {"pool": pool}
    with _RECORDING_LOCK, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local", **own):
                yield
        except BaseException:
            try:
                _record_something(device)
            except RuntimeError as error:
                warnings.warn(f"random numbers of {device} may fail from now on: {error}", stacklevel=2)
            raise


def _record_something(device: torch.device) -> None:
    """After a recording that failed, PyTorch (2.11) still takes every random number for one of a recording.

    Each use is then an error, until another recording succeeds.
    """
    place = torch.empty(1, device=device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
        place.zero_()
