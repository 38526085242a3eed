"""A recording of operators that stands in for a CUDA graph on the CPU.

Like a graph, a replay runs no Python code of the recorded function, reads and writes the tensors of the recording,
and allocates nothing: every operator writes its results where they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"), f"{name} waits for a GPU"
        result = function(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        new = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.calls.append((function, args, kwargs, new if not given else [_own(x, given) for x in new]))
        return result


def _own(x: Tensor, given: set[int]) -> Any:
    """The tensor, or None for a view of an argument."""
    return None if x.untyped_storage().data_ptr() in given else x


def recording(count: list[int]) -> Callable[..., tuple[Callable[[], object], Tensor]]:
    """A function like `gka.hf.captured_step.record`; count gets a 1 for every recording, a 0 for every replay.

    Recording runs the function, other than with a graph, so the first replay has nothing left to do.
    """

    def record(function: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], Tensor]:
        with _Recorder() as recorder:
            result = function()
        count.append(1)
        has_run = [True]

        def replay() -> None:
            count.append(0)
            if has_run:
                has_run.pop()
                return
            for operator, args, kwargs, results in recorder.calls:
                again = [x for x in tree_leaves(operator(*args, **kwargs)) if isinstance(x, Tensor)]
                for held, x in zip(results, again, strict=True):
                    if held is not None:
                        held.copy_(x)

        return replay, result

    return record
