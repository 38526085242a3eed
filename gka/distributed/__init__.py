"""Context parallelism: several ranks share the tokens of every row (docs/parallel.md)."""

from .context_parallel import ContextParallel
from .op import gated_kalmanet
from .shard import Shard

__all__ = ["ContextParallel", "Shard", "gated_kalmanet"]
