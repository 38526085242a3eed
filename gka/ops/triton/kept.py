"""Tables on a device that outlive a call.

Under a CUDA graph, and while torch.compile warms one up, allocations of a thread come from the graph's own memory.
Nothing there lasts, and nothing has a value before the graph is replayed. So tables that are kept are made in
another thread, and a table that is needed while a graph is captured is part of the graph or was made before.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def capturing(device: torch.device) -> bool:
    """Whether the current stream of a GPU is captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def to_keep(make: Callable[[], T], device: torch.device) -> T:
    """What `make` makes on the device, in memory of no graph, ready for every stream.

    Raises:
        RuntimeError: a CUDA graph is captured.
    """
    if device.type != "cuda":
        return make()
    if capturing(device):
        raise RuntimeError(
            "a CUDA graph is captured before the first call with these solver steps; call once before"
        )
    with ThreadPoolExecutor(1) as thread:
        made = thread.submit(make).result()
    torch.cuda.default_stream(device).synchronize()  # once: later calls may be in another stream than this one
    return made
