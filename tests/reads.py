"""Which operators hand a tensor's value to Python: on a GPU each of them waits."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item")


class Reads(TorchDispatchMode):
    """The operators met that hand a tensor's value to Python: on a GPU each of them waits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in READS:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))
