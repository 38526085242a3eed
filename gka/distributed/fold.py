"""The state before a piece of the global row, from what the pieces before it add (paper, section 4.1).

    S_before(p) = sum_{i <= r < p} e^{L_{r+1} + ... + L_{p-1}} S_r        L_r = sum of g over piece r

S_r is what piece r adds to the state of its last sequence; i is the piece in which the sequence begins. Every rank
sends (L, S_kk, S_kv) of its pieces in one all-gather. Its gradient is one reduce-scatter.

Legend: B rows, H query heads, D key dim, V value dim, n ranks, s pieces of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.types import State
from .collectives import all_gather
from .shard import Shard
from .sums import SpanSums, finite, sums_after


def exchanged(sums: Sequence[SpanSums], shard: Shard) -> SpanSums:
    """The sums of all pieces, [n s, B, H, ...] in the order of the global row, from those of this rank's."""
    like = sums[0]
    parts = [x for x in (like.S_kk, like.S_kv) if x is not None]
    shapes = [x.shape[2:] for x in parts]
    flat = torch.stack([_flat(piece) for piece in sums])
    everyone = all_gather(flat, shard.context.group)
    first, *others = everyone.unbind(1)
    in_order = torch.cat([first, *(other.flip(0) for other in others)])
    *states, log_decay = in_order.split([*(shape.numel() for shape in shapes), 1], 3)
    states = [x.unflatten(3, shape) for x, shape in zip(states, shapes, strict=True)]
    return SpanSums(log_decay.squeeze(3), states[0] if like.S_kk is not None else None, states[-1])


def _flat(sums: SpanSums) -> Tensor:
    """[B, H, D * D + D * V + 1]."""
    states = [x.flatten(2) for x in (sums.S_kk, sums.S_kv) if x is not None]
    return torch.cat([*states, sums.log_decay.unsqueeze(2)], 2)


def state_before(pieces: SpanSums, first: int, stop: int) -> State:
    """The state after the pieces `first` to `stop - 1`, [B, H, D, .].

    Without such pieces it is zero, and still depends on `pieces`: all ranks must run the exchange's backward pass.
    """
    weight = sums_after(finite(pieces.log_decay[first:stop]), 0).exp()[..., None, None]
    S_kk = None if pieces.S_kk is None else (weight * pieces.S_kk[first:stop]).sum(0)
    return State(S_kk, (weight * pieces.S_kv[first:stop]).sum(0))


def carried(sums: SpanSums, initial: State) -> SpanSums:
    """The sums of a span that begins with a state, not with zeros."""
    decay = sums.log_decay.exp()[..., None, None]
    S_kk = None if sums.S_kk is None or initial.S_kk is None else sums.S_kk + decay * initial.S_kk
    return SpanSums(sums.log_decay, S_kk, sums.S_kv + decay * initial.S_kv)


def tied(sums: SpanSums, initial: State) -> SpanSums:
    """The same sums, which autograd takes for a function of the state as well, with a gradient of zero.

    So that all ranks have a backward pass of the exchange if only the initial state has gradients.
    """
    nothing = sum((x[:0].sum() for x in initial if x is not None), start=sums.S_kv.new_zeros(()))
    return sums._replace(S_kv=sums.S_kv + nothing)
