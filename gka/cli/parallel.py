"""The processes of `gka train`: which of them share sequences, heads and weights (docs/parallel.md)."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..hf.config import GKAConfig
from ..training.context_parallel import ContextParallelTrainer
from ..training.errors import UserError
from ..training.sharding import ShardedTrainer
from ..training.trainer import GKATrainer
from .commands import TrainOptions


class _TrainerOfSharedRows(ContextParallelTrainer, GKATrainer):
    """A GKATrainer whose processes share the tokens of every sequence."""


class _TrainerOfSharedModels(ShardedTrainer, GKATrainer):
    """A GKATrainer whose processes share the model."""


def per_row(options: TrainOptions) -> int:
    """The number of processes that have the same sequences."""
    return options.context_parallel * options.tensor_parallel


def parallel_trainer(options: TrainOptions, config: GKAConfig, eval_len: int) -> Any:
    """The class of the Trainer for these options, and its arguments; eval_len: tokens of a validation sequence."""
    pieces = 2 * options.context_parallel  # of a sequence, in the layout that shares the cost of attention
    zigzag = config.has_attention and options.seq_len % pieces == eval_len % pieces == 0
    layout = "zigzag" if zigzag else "contiguous"
    if options.fsdp or options.tensor_parallel > 1:
        return partial(
            _TrainerOfSharedModels,
            context_parallel=options.context_parallel,
            tensor_parallel=options.tensor_parallel,
            layout=layout,
        )
    if options.context_parallel > 1:
        return partial(_TrainerOfSharedRows, processes_per_row=options.context_parallel, layout=layout)
    return GKATrainer


def check_parallel(options: TrainOptions, config: GKAConfig, processes: int) -> None:
    """UserError for options that do not fit the number of processes, or each other."""
    rows, heads = options.context_parallel, options.tensor_parallel
    given = {"--context-parallel": rows, "--tensor-parallel": heads}
    asked = " ".join(f"{flag} {n}" for flag, n in given.items() if n > 1)
    if processes % (rows * heads):
        raise UserError(
            f"{asked} needs a multiple of {rows * heads} processes, there are {processes}: "
            f"torchrun --nproc_per_node {rows * heads} -m gka train ..."
        )
    if options.family != "gka" and asked:
        raise UserError(f"{asked} needs --family gka, not {options.family}")
    if options.compile and (asked or options.fsdp):
        raise UserError(f"{asked or '--fsdp'} does not work with --compile")
    if config.has_attention and options.seq_len < rows:
        raise UserError(f"--seq-len {options.seq_len} must be at least --context-parallel, {rows}")
    _check_shares(options, config, processes)


def _check_shares(options: TrainOptions, config: GKAConfig, processes: int) -> None:
    heads = options.tensor_parallel
    if options.fsdp and processes == heads:
        also = f" beside the {heads} of --tensor-parallel" if heads > 1 else ""
        raise UserError(f"--fsdp needs several processes{also}, there are {processes}: start them by torchrun")
    if heads > 1 and not options.fsdp and processes > heads:
        raise UserError(f"--tensor-parallel {heads} with {processes} processes needs --fsdp")
    sizes = {
        "--heads": config.num_attention_heads,
        "--kv-heads": config.num_key_value_heads,
        "--intermediate-size": config.intermediate_size,
    }
    for name, size in sizes.items():
        if size % heads:
            raise UserError(f"{name} {size} must be a multiple of --tensor-parallel, {heads}")
