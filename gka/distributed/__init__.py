"""Several processes for one model: tensor parallelism and FSDP2."""

from .shard_model import shard_model
from .tensor_parallel import parallel_plan, tensor_parallel

__all__ = ["parallel_plan", "shard_model", "tensor_parallel"]
