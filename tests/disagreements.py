"""Calls of ranks that disagree: the error of each rank."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from helpers import INPUTS, Case, make_inputs
from model_helpers import random_inputs, random_tokens, tiny_config, tiny_layer, tiny_model
from torch import Tensor

from gka import GKAForCausalLM
from gka.distributed import ContextParallel, Part, gated_kalmanet, parallelize

SHARDS: dict[str, tuple[Callable[[int], Any], str]] = {  # arguments of rank 0, 1 or 2, what the error says
    "T": (lambda rank: (8 + (rank == 1),), "T: 8 on ranks 0, 2; 9 on rank 1"),
    "T, one of them wrong": (lambda rank: (8 - 9 * (rank == 2),), "T: 8 on ranks 0, 1; -1 on rank 2"),
    "edges": (lambda rank: (8, [0, 3 + rank, 8]), "cu_seqlens[1]: 3 on rank 0; 4 on rank 1; 5 on rank 2"),
    "edges, one of them wrong": (
        lambda rank: (8, [0, 3, 8 + (rank == 0)]),
        "cu_seqlens[2]: 9 on rank 0; 8 on ranks 1, 2",
    ),
    "number of edges": (
        lambda rank: (8, [0, 3, *[8] * (1 + (rank == 2))]),
        "the length of cu_seqlens: 3 on ranks 0, 1; 4 on rank 2",
    ),
    "packing": (
        lambda rank: (8, [0, 3, 8] if rank else None),
        "cu_seqlens: None on rank 0; 3 numbers on ranks 1, 2",
    ),
}


def tokens(B: int = 1, T: int = 12, seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": random_tokens(B, T, seed=seed), "labels": random_tokens(B, T, seed=seed)}


MODELS: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "tokens": (
        lambda rank: tokens(T=12 + rank // 2),
        "input_ids: int64 [1, 12] with checksum",
    ),
    "rows": (lambda rank: tokens(B=1 + (rank == 1)), "int64 [2, 12] with checksum"),
    "other batches": (lambda rank: tokens(seed=rank), "int64 [1, 12] with checksum"),
    "no labels": (
        lambda rank: {"input_ids": tokens()["input_ids"], **(tokens() if rank else {})},
        "labels: nothing on rank 0",
    ),
    "mask": (
        lambda rank: tokens() | ({"attention_mask": torch.ones(1, 12)} if rank else {}),
        "attention_mask: nothing on rank 0; float32 [1, 12] on ranks 1, 2. Expected",
    ),
    "dtype": (
        lambda rank: {"inputs_embeds": random_inputs(1, 12, 36).to((torch.float32, torch.float64)[rank // 2])},
        "inputs_embeds: float32 [1, 12, 36] on ranks 0, 1; float64 [1, 12, 36] on rank 2. Expected",
    ),
}


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def of_shards(group: Any, name: str, layout: Any) -> str:
    """The error of `ContextParallel.shard`."""
    return _error(lambda: ContextParallel(group, layout).shard(*SHARDS[name][0](dist.get_rank())))


def of_models(group: Any, name: str) -> str:
    """The error of a call of a model."""
    model = tiny_model("gka")
    parallelize(model, ContextParallel(group))
    return _error(lambda: model(**MODELS[name][0](dist.get_rank())))


def of_others(group: Any) -> dict[str, str]:
    """The errors where the plan or the batch is the same on all ranks, and something else is not."""
    rank, context = dist.get_rank(), ContextParallel(group)
    case = Case(lengths=(12,) * (1 + (rank == 1)))
    good = {name: x for name, x in make_inputs(case).items() if name in INPUTS[:6]}
    shard = context.shard(12)
    layer = tiny_layer(conv_size=4 + (rank == 2))
    config = tiny_config("gka", solver_steps=(8 + rank,))
    calls = {
        "op": lambda: gated_kalmanet(**{name: shard.take(x) for name, x in good.items()}, shard=shard),
        "layer": lambda: layer(shard.take(random_inputs(1, 12, 36)), context_parallel=Part(shard)),
        "layout": lambda: ContextParallel(group, "zigzag" if rank else "contiguous").shard(12),
        "model": lambda: parallelize(GKAForCausalLM(config), context),
        "kinds of calls": lambda: context.shard(12) if rank else tiny_parallel(context),
    }
    return {name: _error(call) for name, call in calls.items()}


def tiny_parallel(context: ContextParallel) -> None:
    parallelize(tiny_model("gka"), context)


def of_a_missing_rank(group: Any) -> str:
    """The error of rank 0 when rank 1 does not call."""
    pair = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    if dist.get_rank() > 1:
        return ""
    context = ContextParallel(pair)
    context.shard(8)
    return _error(lambda: context.shard(8)) if dist.get_rank() == 0 else ""
