"""The op on rows whose tokens several ranks share (paper, section 4.1).

    1. Each rank computes what its tokens add to the running sums (`sums`), without a solve.
    2. One all-gather sends these sums to every rank (`fold`).
    3. Each rank folds the sums before its tokens into its initial state.
    4. It runs `gka.ops.gated_kalmanet` on its tokens.

The backward pass goes the same way back: the op gives the gradient of the initial state, one reduce-scatter brings
it to the earlier ranks, and the sums add their part to the gradients of keys, values and gates. The solutions of
the ridge regressions do not depend on gradients from later ranks, so no solve runs twice.

Legend: B rows, T tokens of the global row, t of this rank, H query heads, Hk key/value heads, D key dim,
V value dim, N sequences of the global row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import State
from ..ops.autocast import autocast_off
from ..ops.checks import (
    check_same_device,
    check_tokens,
    checked_plan,
    checked_state,
)
from ..ops.transforms import transforms_active
from .collectives import all_reduce
from .fold import carried, states_before, tied
from .shard import Shard
from .sums import span_sums


def gated_kalmanet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    shard: Shard,
    initial_state: State | Sequence[Tensor | None] | None = None,
    output_final_state: bool = False,
    normalize_qk: bool = False,
    **options: Any,
) -> tuple[Tensor, State | None]:
    """`gka.ops.gated_kalmanet` on a row that the ranks of a group share. Every rank of the group calls it.

    Args:
        q, k, v, g, alpha, beta: this rank's tokens, [B, t, ...] as `gka.ops.gated_kalmanet` takes them; B is 1 for
            a packed row. `shard.take` cuts them from global tensors.
        shard: from `ContextParallel.shard`; it has the packing, in place of `cu_seqlens`.
        initial_state: states before the first tokens, S_kk [B or N, H, D, D] and S_kv [B or N, H, D, V], the same
            on every rank. A rank uses those of the sequences that begin on it.
        output_final_state: whether to return the states after the last tokens. They need one collective more.
        normalize_qk: as in `gka.ops.gated_kalmanet`.
        **options: the other options of `gka.ops.gated_kalmanet`: solver, solver_steps, tolerance, ridge_ratio,
            scale, chunk_size, backend.

    Returns:
        o [B, t, H, V] of this rank's tokens, and the final State of the global rows, [B or N, H, D, .], the same
        on every rank, or None.

    Gradients are those of the sum over ranks of what each rank computes from its results. Every rank must run the
    backward pass, also a rank without tokens. Each rank has its own part of the gradient of `initial_state`; their
    sum is the gradient.

    Raises:
        TypeError, ValueError: as `gka.ops.gated_kalmanet`; or t is not the shard's, a packed row has B > 1, or a
            transform of torch.func is active.
        RanksDisagree: at the first call with a shard, another rank has other rows, heads, dims or dtypes.
    """
    initial, with_kk = _checked(q, k, v, g, alpha, beta, shard, initial_state, options)
    shard.agree_once(
        "gated_kalmanet",
        {
            "q": _told(q),
            "k": _told(k),
            "v": _told(v),
            "g": _told(g),
            "solver_steps other than ()": with_kk,
            "initial_state": initial is not None,
            "output_final_state": output_final_state,
        },
    )
    segments = segments_of(shard)
    with autocast_off(q.device):
        sent = []
        for segment in segments:
            keys, values, decays = (_cut(x, segment.sent) for x in (k, v, g))
            strengths = None if beta is None else _cut(beta, segment.sent)
            sums = span_sums(keys, values, decays, strengths, normalize_k=normalize_qk, with_kk=with_kk)
            if initial is not None and segment.sent_begins_here:
                sums = carried(sums, _of(initial, segment.global_sequences[-1:], shard))
            elif initial is not None:
                sums = tied(sums, initial)
            sent.append(sums)
        before = states_before(sent, [(segment.origin, segment.piece) for segment in segments], shard)
        states = [_first_states(*pair, initial, shard) for pair in zip(before, segments, strict=True)]
        tensors, state, cu_seqlens = _local_call((q, k, v, g, alpha, beta), states, shard)
        o, final = ops.gated_kalmanet(
            *tensors,  # type: ignore[arg-type]  # alpha and beta may be None
            initial_state=state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            normalize_qk=normalize_qk,
            **options,
        )
        o = o.reshape(*q.shape[:3], v.shape[3])
        if final is None:
            return o, None
        return o, _final_state(final, segments, q.shape[0], shard)


def _told(x: Tensor) -> str:
    """What ranks have in common of a tensor [B, t, ...]."""
    return f"{x.dtype} [{x.shape[0]}, t, {', '.join(map(str, x.shape[2:]))}]"


class Segment(NamedTuple):
    """One segment of this rank, with numbers of the host.

    piece: its number in the global row.
    origin: the piece in which its first sequence begins, or its own.
    sequences: which local sequences it has.
    global_sequences: their numbers in the global row; none in a segment without tokens.
    ended: how many of them end here.
    sent: which local tokens later pieces need: those of the last sequence if it goes on, else none.
    sent_begins_here: whether it goes on and begins here.
    """

    piece: int
    origin: int
    sequences: slice
    global_sequences: tuple[int, ...]
    ended: int
    sent: slice
    sent_begins_here: bool


def segments_of(shard: Shard) -> list[Segment]:
    """The segments of this rank."""
    plan, found, first = shard.sequences, [], 0
    for n, count in enumerate(plan.counts):
        last = first + count
        indices = tuple(index for index in plan.indices[first:last] if index >= 0)
        goes_on, stop = plan.open[n], plan.cu_seqlens[last]
        found.append(
            Segment(
                piece=plan.pieces[n],
                origin=plan.origins[n],
                sequences=slice(first, last),
                global_sequences=indices,
                ended=len(indices) - goes_on,
                sent=slice(plan.cu_seqlens[last - 1] if goes_on else stop, stop),
                sent_begins_here=goes_on and not (plan.continues[n] and count == 1),
            )
        )
        first = last
    return found


def _cut(x: Tensor, tokens: slice) -> Tensor:
    """x[:, tokens]; x itself for all tokens, whose gradient then needs no copy."""
    return x if (tokens.start, tokens.stop) == (0, x.shape[1]) else x[:, tokens]


def _of(state: State, sequences: Sequence[int], shard: Shard) -> State:
    """The states of some consecutive sequences; of all rows where the row is not packed."""
    if not shard.packed:
        return state
    part = slice(sequences[0], sequences[-1] + 1)
    return State(None if state.S_kk is None else state.S_kk[part], state.S_kv[part])


def _first_states(before: State, segment: Segment, initial: State | None, shard: Shard) -> State:
    """The states before the sequences of a segment, [B or local sequences, H, D, .]; `before`: the first's."""
    own = segment.global_sequences
    given = _of(initial, own, shard) if initial is not None and own else State(None, None)  # type: ignore[arg-type]
    begins_here, others = segment.origin == segment.piece, max(len(own) - 1, 0)
    S_kk = None if before.S_kk is None else _followed(before.S_kk, given.S_kk, begins_here, others)
    return State(S_kk, _followed(before.S_kv, given.S_kv, begins_here, others))


def _followed(before: Tensor, given: Tensor | None, begins_here: bool, others: int) -> Tensor:
    """`before` for the first sequence of a segment, or for all rows, then what is given for the others."""
    if given is None:
        return torch.cat([before, before.new_zeros(others, *before.shape[1:])]) if others else before
    rows = before.shape[0]
    return torch.cat([before + given[:rows] if begins_here else before, given[rows:]])


def _local_call(
    tensors: Sequence[Tensor | None], states: Sequence[State], shard: Shard
) -> tuple[list[Tensor | None], State, Tensor | None]:
    """Inputs, initial state and cu_seqlens of the op. Two segments of rows that are not packed are 2 B rows."""
    S_kk = [state.S_kk for state in states if state.S_kk is not None]
    S_kv = [state.S_kv for state in states]
    if shard.packed:
        joined = State(torch.cat(S_kk) if S_kk else None, torch.cat(S_kv))
        return list(tensors), joined, shard.cu_seqlens(S_kv[0].device)
    n = len(states)
    rows = [None if x is None else x.unflatten(1, (n, x.shape[1] // n)).flatten(0, 1) for x in tensors]
    return rows, State(_side_by_side(S_kk) if S_kk else None, _side_by_side(S_kv)), None


def _side_by_side(states: Sequence[Tensor]) -> Tensor:
    """[B, ...] of each segment -> [B * segments, ...]."""
    return torch.stack(list(states), 1).flatten(0, 1)


def _final_state(final: State, segments: Sequence[Segment], B: int, shard: Shard) -> State:
    """The final states of the global rows, from those of the local sequences: one all-reduce of what ends here."""
    parts = [x for x in final if x is not None]
    flat = torch.cat([x.flatten(2) for x in parts], 2)
    number = shard.sequences.number if shard.packed else B
    total = flat.new_zeros(number, *flat.shape[1:])
    for n, segment in enumerate(segments):
        if shard.packed:
            first = segment.sequences.start
            ended, place = flat[first : first + segment.ended], min((*segment.global_sequences, number))
        else:
            ended, place = flat.unflatten(0, (B, len(segments)))[: B * segment.ended, n], 0
        before, after = (flat.new_zeros(k, *flat.shape[1:]) for k in (place, number - place - ended.shape[0]))
        total = total + torch.cat([before, ended, after])
    total = all_reduce(total, shard.context.group)
    *S_kk, S_kv = (
        part.unflatten(2, x.shape[2:])
        for part, x in zip(total.split([x.shape[2:].numel() for x in parts], 2), parts, strict=True)
    )
    return State(S_kk[0] if S_kk else None, S_kv)


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    shard: Shard,
    initial_state: Any,
    options: dict[str, Any],
) -> tuple[State | None, bool]:
    """Check what the sums and the exchange need, before anything is sent. The op checks the rest.

    Returns:
        The initial state as a State or None, and whether there is a solve.
    """
    if not isinstance(shard, Shard):
        raise TypeError(f"shard is a {type(shard).__name__}; expected the result of ContextParallel.shard")
    if "cu_seqlens" in options:
        raise TypeError("cu_seqlens is given; expected ContextParallel.shard(T, cu_seqlens) to have it")
    if transforms_active():
        raise ValueError(
            "a transform of torch.func or forward mode is active; expected a plain call in every process, "
            "with gradients by backward()"
        )
    check_tokens(q, k, v, g, alpha, beta, "[B, T, H, D]")
    (B, t, H, D), V = q.shape, v.shape[3]
    if t != shard.local_tokens:
        raise ValueError(
            f"q has shape {tuple(q.shape)}; expected {shard.local_tokens} tokens in dim 1, this process's of "
            f"{shard.tokens}: cut global tensors by shard.take"
        )
    if shard.packed and B != 1:
        raise ValueError(f"q has batch size {B}; expected 1 with a packed batch: concatenate the sequences")
    solver, steps, tolerance = (options.get(name) for name in ("solver", "solver_steps", "tolerance"))
    steps = checked_plan(solver or "chebyshev", steps, tolerance, q.dtype).solver_steps
    check_same_device(q, k=k, v=v, g=g, alpha=alpha, beta=beta)
    if initial_state is None:
        return None, bool(steps)
    N = shard.sequences.number if shard.packed else B
    return checked_state("initial_state", initial_state, N, H, D, V, steps, q), bool(steps)
