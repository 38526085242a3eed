"""A recording of operators that stands in for a CUDA graph on the CPU.

Like a graph, a replay runs no Python code of the recorded function, reads and writes the tensors of the recording,
and allocates nothing: every operator writes its results where they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from reads import READS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor | None]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        result = function(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        found = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        views = [x.untyped_storage().data_ptr() in given for x in found]
        own = [None if view else x for x, view in zip(found, views, strict=True)]
        self.calls.append((function, args, kwargs, own))
        return result


def record(function: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], Tensor]:
    """As `gka.hf.captured_step.record`, for any device.

    Recording runs the function, other than with a graph, so the first replay has nothing left to do.

    Raises:
        RuntimeError: an operator hands a value to Python, which waits for a GPU.
    """
    with _Recorder() as recorder:
        result = function()
    has_run = [True]

    def replay() -> None:
        if has_run:
            has_run.pop()
            return
        with torch.inference_mode():  # may write what was made in it
            for operator, args, kwargs, results in recorder.calls:
                again = [x for x in tree_leaves(operator(*args, **kwargs)) if isinstance(x, Tensor)]
                for held, x in zip(results, again, strict=True):
                    if held is not None:
                        held.copy_(x)

    return replay, result
