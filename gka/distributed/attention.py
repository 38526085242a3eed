"""Causal softmax attention under context parallelism, for transformers' models: keys and values are gathered.

Each rank has the queries of its own tokens and gets the keys and values of all. A query of the global position p
sees the keys of its sequence up to p, at most `sliding_window` of them, without padding.

PyTorch's own context parallelism (torch.distributed.tensor.experimental) replaces CUDA kernels by rings of them.
It has no CPU kernel, no packed sequences, no sliding window and no padding. Here one form serves all of these, and
both layouts. It needs memory for the keys and values of the whole row, of one layer at a time.

Legend: B batch, T tokens of the global row, t tokens of this rank, H query heads, Hk key/value heads, D head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.utils._python_dispatch import _disable_current_modes

from ..ops.autocast import autocast_dtype
from .part import Part
from .shard import Shard

NAME = "gka_context_parallel"  # of the implementation, in transformers
_QUERIES = 2048  # of one call with a mask, which has an entry for each pair


class Stretch(NamedTuple):
    """Consecutive queries that see keys from one on: the queries of one sequence.

    local: the first query's place among this rank's tokens.
    first, stop: global positions of the first query, and behind the last one.
    key: global position of the first key that any of them sees.
    """

    local: int
    first: int
    stop: int
    key: int


@_disable_dynamo  # what is around it is compiled once for all plans
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    context_parallel: Part | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of this rank's queries, as transformers calls it.

    Args:
        module: the layer; not used.
        query: [B, H, t, D].
        key, value: [B, Hk, t, D].
        attention_mask: None; the part knows the padding.
        context_parallel: the part of the batch.
        dropout, scaling, sliding_window: as in transformers.
        **others: other keywords of transformers' layers. They describe packed sequences, which the part knows.

    Returns:
        [B, t, H, D], and None for the weights.

    Raises:
        ValueError: there is no part, or there is a mask, or the weights are asked for.
    """
    if context_parallel is None:
        raise ValueError(
            f"attention implementation {NAME!r} is called without context_parallel; call the model that was given "
            "to gka.distributed.parallelize, or set another implementation by set_attn_implementation"
        )
    if attention_mask is not None or others.get("output_attentions"):
        name = "output_attentions" if attention_mask is None else "attention_mask"
        raise ValueError(f"{name} is given; expected none under context parallelism")
    dtype = autocast_dtype(query.device)  # rotary embeddings leave queries and keys in float32 under autocast
    if dtype is not None and query.dtype != torch.float64:
        query, key, value = (x.to(dtype) for x in (query, key, value))
    shard = context_parallel.shard
    keys, values = shard.gather(torch.cat([key, value], dim=1), dim=2).chunk(2, dim=1)
    masked = sliding_window is not None or context_parallel.real is not None
    grouped = query.shape[1] != key.shape[1]
    narrow = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    if grouped and (masked or not narrow):  # other kernels take no groups
        keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (keys, values))
        grouped = False
    outputs = []
    for stretch in _stretches(shard, sliding_window, _QUERIES if masked else None):
        tokens = stretch.stop - stretch.first
        seen = slice(stretch.key, stretch.stop)
        mask = _mask(stretch, sliding_window, context_parallel.real, query.device) if masked else None
        outputs.append(
            F.scaled_dot_product_attention(
                query.narrow(2, stretch.local, tokens),
                keys[:, :, seen],
                values[:, :, seen],
                attn_mask=_causal(tokens, stretch.stop - stretch.key) if mask is None else mask,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _stretches(shard: Shard, window: int | None, most: int | None) -> Iterator[Stretch]:
    """All queries of this rank, of one sequence each, at most `most` at a time."""
    plan, local, sequence = shard.sequences, 0, 0
    for (position, _), count in zip(shard.segments, plan.counts, strict=True):
        for n in range(sequence, sequence + count):
            length = plan.cu_seqlens[n + 1] - plan.cu_seqlens[n]
            step = length if most is None else most
            for done in range(0, length, max(step, 1)):
                first, stop = position + done, position + min(done + step, length)
                key = plan.begins[n] if window is None else max(plan.begins[n], first - window + 1)
                yield Stretch(local + done, first, stop, key)
            position, local = position + length, local + length
        sequence += count


@functools.lru_cache(maxsize=4096)
def _causal(queries: int, keys: int) -> CausalBias:
    """The mask that PyTorch's kernels know: the last query sees all keys, each one before it a key less.

    Such a tensor cannot be made where a mode watches operators, as FlopCounterMode and selective checkpointing do.
    """
    with _disable_current_modes():
        return causal_lower_right(queries, keys)


def _mask(stretch: Stretch, window: int | None, real: Tensor | None, device: torch.device) -> Tensor:
    """[B or 1, 1, queries, keys] of bool, True where a query sees a key; a pad may see none, its output is 0."""
    p = torch.arange(stretch.first, stretch.stop, device=device).unsqueeze(1)
    key = torch.arange(stretch.key, stretch.stop, device=device)
    sees = key <= p
    if window is not None:
        sees = sees & (key > p - window)
    if real is None:
        return sees[None, None]
    return sees & real[:, None, None, stretch.key : stretch.stop]
