"""The state before a piece of the global row, from what the pieces before it add (paper, section 4.1).

    S_before(p) = sum_{i <= r < p} W_r S_r      W_r = e^{L_{r+1} + ... + L_{p-1}}      L_r = sum of g over piece r

S_r is what piece r adds to the state of its last sequence; i is the piece in which the sequence begins. Every rank
sends (S_kk, S_kv, L) of its pieces in one all-gather. With the gradient D_p of S_before(p), of all pieces p that
begin after r, one reduce-scatter brings back

    dS_r = sum_p W_r D_p            dL_r = sum_p sum_{i <= j < r} W_j <S_j, D_p>

Legend: B rows, H query heads, F numbers of a head (`sums.SpanSums`), n ranks, s pieces of a rank, P = n s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops.types import State
from .collectives import gathered_pieces, refuse_second_derivatives, scattered_sum
from .shard import Shard
from .sums import SpanSums, finite, sums_after, sums_before


def states_before(sums: Sequence[SpanSums], reach: Sequence[tuple[int, int]], shard: Shard) -> list[State]:
    """The states before the pieces of this rank, [B, H, D, .] each.

    Without earlier pieces a state is zero, and still depends on the sums: all ranks must run the exchange's
    backward pass.

    Args:
        sums: what each piece of this rank adds.
        reach: for each of them the pieces that its state comes from, from the first number to below the second.
        shard: the plan of the batch.
    """
    own = sums[0].flat.unsqueeze(0) if len(sums) == 1 else torch.stack([piece.flat for piece in sums])
    found = _StatesBefore.apply(own, tuple(reach), shard.context, sums[0].states_of)
    if not sums[0].with_kk:
        return [State(None, S_kv) for S_kv in found]
    return [State(*pair) for pair in zip(found[::2], found[1::2], strict=True)]


class _StatesBefore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        own: Tensor,
        reach: tuple[tuple[int, int], ...],
        context: Any,
        states_of: Callable[[Tensor], State],
    ) -> tuple[Tensor, ...]:
        ctx.reach, ctx.context = reach, context
        gathered = gathered_pieces(own, context.group)
        pieces = gathered.flatten(0, 1)  # of the ranks one after the other
        if len(reach) > 1:
            pieces = torch.stack([gathered[rank, place] for rank, place in context.holders()])
        ctx.weights = [_weights(pieces[first:stop, ..., -1]) for first, stop in reach]
        ctx.save_for_backward(pieces)
        folded = (
            states_of((weight * pieces[first:stop, ..., :-1]).sum(0))
            for (first, stop), weight in zip(reach, ctx.weights, strict=True)
        )
        return tuple(x.contiguous() for state in folded for x in state if x is not None)

    @staticmethod
    def backward(ctx: Any, *d_matrices: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_second_derivatives()
        (pieces,) = ctx.saved_tensors
        total, number = torch.zeros_like(pieces), len(d_matrices) // len(ctx.reach)
        flat = [d.flatten(2) for d in d_matrices]
        d_states = [torch.cat(flat[n : n + number], 2) for n in range(0, len(flat), number)]
        for (first, stop), weight, d_state in zip(ctx.reach, ctx.weights, d_states, strict=True):
            # Also without pieces: a compiler must not send this before what other ranks send before it.
            d_weight = (pieces[first:stop, ..., :-1] * d_state).sum(-1, keepdim=True)
            total[first:stop, ..., :-1] += weight * d_state
            total[first:stop, ..., -1:] += sums_before(d_weight * weight, 0)
        if len(ctx.reach) > 1:
            ranks = range(ctx.context.size)
            total = torch.stack([total[piece] for rank in ranks for piece in ctx.context.pieces(rank)])
        return scattered_sum(total.unflatten(0, (ctx.context.size, -1)), ctx.context.group), None, None, None


def _weights(log_decays: Tensor) -> Tensor:
    """e^{L_{r+1} + ...} of the pieces r, [p, B, H, 1], from their L [p, B, H]."""
    return sums_after(finite(log_decays), 0).exp().unsqueeze(-1)


def carried(sums: SpanSums, initial: State) -> SpanSums:
    """The sums of a span that begins with a state, not with zeros."""
    decay = sums.log_decay.exp()[..., None, None]
    S_kk = None if sums.S_kk is None or initial.S_kk is None else sums.S_kk + decay * initial.S_kk
    return sums.replaced(S_kk, sums.S_kv + decay * initial.S_kv)


def tied(sums: SpanSums, initial: State) -> SpanSums:
    """The same sums, which autograd takes for a function of the state as well, with a gradient of zero.

    So that all ranks have a backward pass of the exchange if only the initial state has gradients.
    """
    nothing = sum((x[:0].sum() for x in initial if x is not None), start=sums.flat.new_zeros(()))
    return replace(sums, flat=sums.flat + nothing)
