"""The short convolution under context parallelism: the W - 1 inputs before a segment, which other ranks have.

Every rank sends the last W - 1 inputs of its segments, the tails, in one exchange. A rank picks the inputs before
its own segments from the tails of the pieces before: several tails where pieces are shorter than W - 1, and none
where a sequence starts with the segment. The convolution then runs over each segment with these inputs in front:

    x_{a-W+1} ... x_{a-1} | x_a ... x_{b-1}      ->      y_a ... y_{b-1}

Legend: B batch, t tokens of this rank, s segments of each row, C channels, W width of the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.short_conv import ShortConv, convolve, last_inputs, packing
from .collectives import all_gather
from .shard import Shard, pieces_of


def preceding_inputs(
    xs: Sequence[Tensor], width: int, shard: Shard, lengths: Tensor | None = None
) -> list[Tensor]:
    """The inputs before each segment of this rank. One exchange for all xs; with gradients, on every rank.

    Args:
        xs: [B, t, C] each, C channels of its own; B is 1 with a packed shard.
        width: W, at least 2.
        shard: the plan of the batch.
        lengths: [B s] int64, the inputs of each segment that count, which come first; None means all.

    Returns:
        [B s, C, W - 1] for each x, in its dtype; zero where a sequence has fewer inputs before the segment.
    """
    s, kept = len(shard.segments), width - 1
    rows = [_as_rows(x, s) for x in xs]
    tails = [last_inputs(x, None, width, lengths) for x in rows]
    if lengths is not None:  # an input counts or it does not: one more channel
        tails.append(last_inputs(torch.ones_like(rows[0][..., :1]), None, width, lengths))
    joined = torch.cat(tails, dim=1).unflatten(0, (-1, s))  # [B, s, channels, W - 1]
    pool = _by_piece(all_gather(joined, shard.context.group), shard)
    if lengths is None:
        found = [_of_plan(pool, shard, segment, kept) for segment in range(s)]
    else:
        found = [_last_that_count(pool[:piece], pool[piece], kept) for piece in shard.sequences.pieces]
    before = torch.stack(found, dim=1).flatten(0, 1)
    widths = [tail.shape[1] for tail in tails]
    return [part.to(x.dtype) for part, x in zip(before.split(widths, dim=1), xs, strict=False)]


def convolve_part(
    convolutions: Sequence[ShortConv | None], xs: Sequence[Tensor], shard: Shard, lengths: Tensor | None = None
) -> list[Tensor]:
    """The convolution of each x [B, t, C] with the inputs before it; where there is no convolution, x."""
    given = [(conv, x) for conv, x in zip(convolutions, xs, strict=True) if conv is not None]
    convs, inputs = [conv for conv, _ in given], [x for _, x in given]
    width = convs[0].kernel_size[0]
    if shard.packed and lengths is not None:
        raise ValueError("an attention_mask is given with packed sequences; leave padding out of a packed batch")
    if width == 1:
        found = convolve(convs, inputs, [None] * len(convs), None)
    else:
        before = preceding_inputs(inputs, width, shard, lengths)
        joined = [_with_front(x, front, shard) for x, front in zip(inputs, before, strict=True)]
        packed = (
            packing(joined[0], _shifted_cu_seqlens(shard, width - 1, joined[0]), width) if shard.packed else None
        )
        ys = convolve(convs, joined, [None] * len(convs), packed)
        found = [_without_front(y, shard, width - 1).reshape(x.shape) for y, x in zip(ys, inputs, strict=True)]
    outputs = iter(found)
    return [x if conv is None else next(outputs) for conv, x in zip(convolutions, xs, strict=True)]


def _as_rows(x: Tensor, segments: int) -> Tensor:
    """[B, t, C] -> [B segments, t / segments, C]."""
    B, t, C = x.shape
    return x.reshape(B * segments, t // segments, C)


def _by_piece(gathered: Tensor, shard: Shard) -> list[Tensor]:
    """[ranks, B, s, channels, W - 1] -> the tails of all pieces in the order of the row, [B, channels, W - 1]."""
    found = {
        piece: gathered[rank, :, place]
        for rank in range(shard.context.size)
        for place, piece in enumerate(shard.context.pieces(rank))
    }
    return [found[piece] for piece in range(len(found))]


def _of_plan(pool: list[Tensor], shard: Shard, segment: int, kept: int) -> Tensor:
    """[B, channels, W - 1] before a segment, by the plan. It always depends on the exchange, for its gradients."""
    plan = shard.sequences
    (start, _), piece = shard.segments[segment], plan.pieces[segment]
    first = max(plan.begins[sum(plan.counts[:segment])], start - kept)
    parts = [pool[piece][..., :0]]
    for (begin, end), tail in zip(pieces_of(shard.tokens, len(pool)), pool[:piece], strict=False):
        if end > max(begin, first):
            parts.append(tail[..., kept - (end - max(begin, first)) :])
    before = torch.cat(parts, dim=-1)
    return F.pad(before, (kept - before.shape[-1], 0))


def _last_that_count(earlier: list[Tensor], own: Tensor, kept: int) -> Tensor:
    """The last W - 1 inputs of all earlier tails that count, as the last channel says; zeros before them."""
    inputs = F.pad(torch.cat([own[..., :0], *earlier], dim=-1), (kept, 0))
    order = (inputs[:, -1] > 0).int().argsort(dim=-1, stable=True)[:, -kept:]
    return inputs.gather(-1, order.unsqueeze(1).expand(-1, inputs.shape[1], -1))


def _with_front(x: Tensor, front: Tensor, shard: Shard) -> Tensor:
    """Each segment behind the inputs before it: [B s, W - 1 + t / s, C], or [1, t + s (W - 1), C] if packed."""
    front = front.transpose(1, 2)
    if not shard.packed:
        return torch.cat([front, _as_rows(x, len(shard.segments))], dim=1)
    segments = x.split([stop - start for start, stop in shard.segments], dim=1)
    fronts = front.split(1)
    return torch.cat([part for pair in zip(fronts, segments, strict=True) for part in pair], dim=1)


def _without_front(y: Tensor, shard: Shard, kept: int) -> Tensor:
    """The opposite of `_with_front`, but for its shape."""
    if not shard.packed:
        return y[:, kept:]
    lengths = [stop - start + kept for start, stop in shard.segments]
    parts = [part[:, kept:] for part in y.split(lengths, dim=1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _shifted_cu_seqlens(shard: Shard, kept: int, like: Tensor) -> Tensor:
    """Local cu_seqlens of `_with_front`: the first sequence of each segment has its W - 1 inputs more."""
    cu_seqlens, counts = shard.cu_seqlens(like.device), shard.sequences.counts
    ends = cu_seqlens[1:].split(counts)
    shifted = [part + kept * (segment + 1) for segment, part in enumerate(ends)]
    return torch.cat([cu_seqlens[:1], *shifted])
