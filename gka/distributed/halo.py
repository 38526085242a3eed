"""The short convolution under context parallelism: the W - 1 inputs before a segment, which other ranks have.

Every rank sends the last W - 1 inputs of its segments, the tails, in one exchange. A rank picks the inputs before
its own segments from the tails of the pieces before: several tails where pieces are shorter than W - 1, and none
where a sequence starts with the segment. The convolution then runs over each segment with these inputs in front:

    x_{a-W+1} ... x_{a-1} | x_a ... x_{b-1}      ->      y_a ... y_{b-1}

Legend: B batch, t tokens of this rank, s segments of each row, C channels, W width of the convolution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.short_conv import ShortConv, are_alike, convolve, last_inputs, packing, weights
from ..ops.transforms import must_dispatch
from ..ops.triton import conv as conv_kernels
from .collectives import all_gather, gathered_pieces, refuse_second_derivatives, scattered_sum
from .shard import Shard, pieces_of


def convolve_part(
    convolutions: Sequence[ShortConv | None], xs: Sequence[Tensor], shard: Shard, lengths: Tensor | None = None
) -> list[Tensor]:
    """The convolution of each x [B, t, C] with the inputs before it; where there is no convolution, x.

    Args:
        convolutions: of width W each.
        xs: of one dtype, C channels of its own each; B is 1 with a packed shard.
        shard: the plan of the batch.
        lengths: [B s] int64, the inputs of each segment that count, which come first; None means all.
    """
    given = [(conv, x) for conv, x in zip(convolutions, xs, strict=True) if conv is not None]
    convs, inputs = [conv for conv, _ in given], [x for _, x in given]
    width = convs[0].kernel_size[0]
    if shard.packed and lengths is not None:
        raise ValueError("an attention_mask is given with packed sequences; leave padding out of a packed batch")
    if width == 1:
        found = convolve(convs, inputs, [None] * len(convs), None)
    elif _by_kernels(given, shard, lengths, width):
        _agree(inputs, width, shard, lengths)
        found = list(_ConvolvedByKernels.apply(shard, weights(convs), *inputs))
    else:
        joined = behind_preceding(inputs, width, shard, lengths)
        packed = (
            packing(joined[0], _shifted_cu_seqlens(shard, width - 1, joined[0]), width) if shard.packed else None
        )
        ys = convolve(convs, joined, [None] * len(convs), packed)
        found = [_without_front(y, shard, width - 1).reshape(x.shape) for y, x in zip(ys, inputs, strict=True)]
    outputs = iter(found)
    return [x if conv is None else next(outputs) for conv, x in zip(convolutions, xs, strict=True)]


def _by_kernels(
    given: Sequence[tuple[ShortConv, Tensor]], shard: Shard, lengths: Tensor | None, width: int
) -> bool:
    """Whether kernels convolve the segments of this rank; others may decide otherwise, and exchange the same."""
    rows = _as_rows(given[0][1], len(shard.segments))
    usable = conv_kernels.usable(rows, width) and not must_dispatch(rows)
    return not shard.packed and lengths is None and usable and are_alike(given)


def behind_preceding(
    xs: Sequence[Tensor], width: int, shard: Shard, lengths: Tensor | None = None
) -> list[Tensor]:
    """Each segment behind the W - 1 inputs before it. One exchange for all xs; with gradients, on every rank.

    Args:
        xs: [B, t, C] each, C channels of its own, of one dtype; B is 1 with a packed shard.
        width: W, at least 2.
        shard: the plan of the batch.
        lengths: [B s] int64, the inputs of each segment that count, which come first; None means all.

    Returns:
        [B s, W - 1 + t / s, C] for each x, or [1, s (W - 1) + t, C] of a packed row. Zeros are in front where a
        sequence has fewer inputs before the segment.
    """
    _agree(xs, width, shard, lengths)
    if lengths is None:
        joined: Sequence[Tensor] = _BehindPreceding.apply(shard, width - 1, *xs)
    else:
        rows = [_as_rows(x, len(shard.segments)) for x in xs]
        fronts = _fronts_that_count(rows, width, shard, lengths)
        joined = [torch.cat([front.mT, x], 1) for front, x in zip(fronts, rows, strict=True)]
    if shard.packed:
        return list(joined)
    return [_as_rows(x, len(shard.segments)) for x in joined] if lengths is None else list(joined)


def _agree(xs: Sequence[Tensor], width: int, shard: Shard, lengths: Tensor | None) -> None:
    shard.agree_once(
        "the exchange of the convolutions",
        {
            "rows": [x.shape[0] for x in xs],
            "channels": [x.shape[2] for x in xs],
            "dtypes": [str(x.dtype) for x in xs],
            "width": width,
            "lengths": lengths is not None,
        },
    )


class _ConvolvedByKernels(torch.autograd.Function):
    """The convolutions of each x [B, t, C], whose kernels read the inputs before a segment where they are."""

    @staticmethod
    def forward(ctx: Any, shard: Shard, weight: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        s = len(shard.segments)
        rows = [_as_rows(x, s) for x in xs]
        front = _exchanged_fronts(xs, shard, weight.shape[1] - 1).flatten(0, 1)
        ctx.shard = shard
        ctx.save_for_backward(weight, front, *rows)
        ys = conv_kernels.launch_forward(rows, weight, front)
        return tuple(y.view(x.shape) for y, x in zip(ys, xs, strict=True))

    @staticmethod
    def backward(ctx: Any, *d_ys: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        shard, (weight, front, *rows) = ctx.shard, ctx.saved_tensors
        s, kept = len(shard.segments), front.shape[1]
        d_rows = [_as_rows(d, s) for d in d_ys]
        dxs, d_weight, d_front = conv_kernels.launch_backward(d_rows, rows, weight, front)
        if any(ctx.needs_input_grad[2:]):  # else a rank without kernels would send nothing
            d_tails = _returned_tails(d_front.unflatten(0, (-1, s)), shard)
            for dx, d_tail in zip(dxs, d_tails.split([x.shape[2] for x in rows], 3), strict=True):
                last = min(kept, dx.shape[1])
                dx[:, dx.shape[1] - last :] += d_tail.flatten(0, 1)[:, kept - last :]
        return None, d_weight, *(dx.view(d.shape) for dx, d in zip(dxs, d_ys, strict=True))


class _BehindPreceding(torch.autograd.Function):
    """[B, t, C] -> [B, s (W - 1) + t, C] for each x: its segments, each behind the inputs before it."""

    @staticmethod
    def forward(ctx: Any, shard: Shard, kept: int, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.shard, ctx.kept, ctx.widths = shard, kept, [x.shape[2] for x in xs]
        fronts = _exchanged_fronts(xs, shard, kept)
        return tuple(
            torch.cat([part for n, (a, b) in enumerate(_places(shard, 0)) for part in (front[:, n], x[:, a:b])], 1)
            for x, front in zip(xs, fronts.split(ctx.widths, 3), strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *d_joined: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        shard, kept = ctx.shard, ctx.kept
        places = _places(shard, kept)
        d_fronts = torch.stack([torch.cat([d[:, a - kept : a] for d in d_joined], 2) for a, _ in places], 1)
        d_tails = _returned_tails(d_fronts, shard)
        dxs = []
        for d, d_tail in zip(d_joined, d_tails.split(ctx.widths, 3), strict=True):
            parts = []
            for n, (a, b) in enumerate(places):
                last = max(a, b - kept)
                parts += [d[:, a:last], d[:, last:b] + d_tail[:, n, kept - (b - last) :]]
            dxs.append(torch.cat(parts, 1))
        return None, None, *dxs


def _exchanged_fronts(xs: Sequence[Tensor], shard: Shard, kept: int) -> Tensor:
    """[B, s, W - 1, sum of C]: the inputs before each segment, from the tails of the segments of all ranks."""
    tails = torch.stack(
        [torch.cat([last_inputs(x[:, a:b], None, kept + 1) for x in xs], 1).mT for a, b in _places(shard, 0)],
        1,
    )
    gathered = gathered_pieces(tails, shard.context.group)
    fronts = torch.zeros_like(tails)
    for copy in _copies(shard, kept):
        fronts[:, copy.segment, copy.to] = gathered[copy.rank, :, copy.place, copy.tail]
    return fronts


def _returned_tails(d_fronts: Tensor, shard: Shard) -> Tensor:
    """The gradients of the tails of this rank [B, s, W - 1, sum of C], from those of the fronts of all ranks."""
    d_gathered = d_fronts.new_zeros(shard.context.size, *d_fronts.shape)
    for copy in _copies(shard, d_fronts.shape[2]):
        d_gathered[copy.rank, :, copy.place, copy.tail] += d_fronts[:, copy.segment, copy.to]
    return scattered_sum(d_gathered, shard.context.group)


class _Copy(NamedTuple):
    """Inputs from the tail of an earlier piece, which is number `place` of `rank`, to the front of a segment."""

    segment: int
    rank: int
    place: int
    tail: slice
    to: slice


def _copies(shard: Shard, kept: int) -> Iterator[_Copy]:
    """The inputs of the same sequence before each segment: several tails where pieces are shorter than W - 1."""
    plan, context = shard.sequences, shard.context
    pieces = pieces_of(shard.tokens, context.size * len(shard.segments))
    holders = context.holders()
    for segment, (start, _) in enumerate(shard.segments):
        first = max(plan.begins[sum(plan.counts[:segment])], start - kept)
        for piece in range(plan.pieces[segment]):
            begin, end = max(pieces[piece][0], first), pieces[piece][1]
            if begin < end:
                tail = slice(kept - (end - begin), kept)
                to = slice(kept - (start - begin), kept - (start - end))
                yield _Copy(segment, *holders[piece], tail, to)


def _places(shard: Shard, kept: int) -> list[tuple[int, int]]:
    """Where each segment stands among this rank's tokens, with `kept` inputs in front of each."""
    found, place = [], 0
    for start, stop in shard.segments:
        found.append((place + kept, place + kept + stop - start))
        place = found[-1][1]
    return found


def _as_rows(x: Tensor, segments: int) -> Tensor:
    """[B, t, C] -> [B segments, t / segments, C]."""
    B, t, C = x.shape
    return x.reshape(B * segments, t // segments, C)


def _fronts_that_count(rows: Sequence[Tensor], width: int, shard: Shard, lengths: Tensor) -> list[Tensor]:
    """The inputs before each segment, [B s, C, W - 1] of each x [B s, t / s, C], of which lengths [B s] count."""
    tails = [last_inputs(x, None, width, lengths) for x in rows]
    # An input counts or it does not: one more channel.
    tails.append(last_inputs(torch.ones_like(rows[0][..., :1]), None, width, lengths))
    joined = torch.cat(tails, dim=1).unflatten(0, (-1, len(shard.segments)))  # [B, s, channels, W - 1]
    pool = _by_piece(all_gather(joined, shard.context.group), shard)
    found = [_last_that_count(pool[:piece], pool[piece], width - 1) for piece in shard.sequences.pieces]
    before = torch.stack(found, dim=1).flatten(0, 1)
    fronts = before.split([tail.shape[1] for tail in tails], dim=1)
    return [front.to(x.dtype) for front, x in zip(fronts, rows, strict=False)]


def _by_piece(gathered: Tensor, shard: Shard) -> list[Tensor]:
    """[ranks, B, s, channels, W - 1] -> the tails of all pieces in the order of the row, [B, channels, W - 1]."""
    return [gathered[rank, :, place] for rank, place in shard.context.holders()]


def _last_that_count(earlier: list[Tensor], own: Tensor, kept: int) -> Tensor:
    """The last W - 1 inputs of all earlier tails that count, as the last channel says; zeros before them."""
    inputs = F.pad(torch.cat([own[..., :0], *earlier], dim=-1), (kept, 0))
    order = (inputs[:, -1] > 0).int().argsort(dim=-1, stable=True)[:, -kept:]
    return inputs.gather(-1, order.unsqueeze(1).expand(-1, inputs.shape[1], -1))


def _without_front(y: Tensor, shard: Shard, kept: int) -> Tensor:
    """The outputs of the segments themselves, up to the shape: [B s, t / s, C], or [1, t, C] if packed."""
    if not shard.packed:
        return y[:, kept:]
    parts = [y[:, a:b] for a, b in _places(shard, kept)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _shifted_cu_seqlens(shard: Shard, kept: int, like: Tensor) -> Tensor:
    """Local cu_seqlens of `_with_front`: the first sequence of each segment has its W - 1 inputs more."""
    cu_seqlens, counts = shard.cu_seqlens(like.device), shard.sequences.counts
    ends = cu_seqlens[1:].split(counts)
    shifted = [part + kept * (segment + 1) for segment, part in enumerate(ends)]
    return torch.cat([cu_seqlens[:1], *shifted])
