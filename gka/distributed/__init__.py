"""Several processes for one model: context parallelism, tensor parallelism and FSDP2 (docs/parallel.md)."""

from importlib import import_module
from typing import Any

from .agreement import RanksDisagree
from .context_parallel import ContextParallel
from .op import gated_kalmanet
from .part import Part
from .shard import Shard

# These need transformers.
_FOUND_IN = {"parallel_plan": "plan", "parallelize": "models", "shard_model": "fsdp", "tensor_parallel": "plan"}

__all__ = [
    "ContextParallel",
    "Part",
    "RanksDisagree",
    "Shard",
    "gated_kalmanet",
    "parallel_plan",
    "parallelize",
    "shard_model",
    "tensor_parallel",
]


def __getattr__(name: str) -> Any:
    if name in _FOUND_IN:
        return getattr(import_module(f"{__name__}.{_FOUND_IN[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
