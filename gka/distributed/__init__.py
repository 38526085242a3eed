"""Several processes for one model: tensor parallelism and FSDP2 (docs/parallel.md)."""

from importlib import import_module
from typing import Any

_FOUND_IN = {"parallel_plan": "plan", "shard_model": "fsdp", "tensor_parallel": "plan"}  # they need transformers

__all__ = ["parallel_plan", "shard_model", "tensor_parallel"]


def __getattr__(name: str) -> Any:
    if name in _FOUND_IN:
        return getattr(import_module(f"{__name__}.{_FOUND_IN[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
