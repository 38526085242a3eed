"""Context parallelism: several ranks share the tokens of every row (docs/parallel.md)."""

from typing import Any

from .agreement import RanksDisagree
from .context_parallel import ContextParallel
from .halo import preceding_inputs
from .op import gated_kalmanet
from .part import Part
from .shard import Shard

__all__ = [
    "ContextParallel",
    "Part",
    "RanksDisagree",
    "Shard",
    "gated_kalmanet",
    "parallelize",
    "preceding_inputs",
]


def __getattr__(name: str) -> Any:
    if name == "parallelize":  # needs transformers
        from .models import parallelize

        return parallelize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
