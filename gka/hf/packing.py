"""Packed batches: several sequences in one row, one after the other, described in one of the ways of collators.

- `cu_seq_lens_q` [N + 1]: the starts of the sequences in a single row, and its length.
- `seq_idx` [B, T]: the sequence number of each token; it changes at the start of a sequence.
- `position_ids` [B, T]: they do not rise at the start of a sequence. A jump forward does not start one.
- `attention_mask` [B, T] with sequence numbers, such as 1 1 2 2 3 0: rising, 0 for padding.

The first token of every row starts a sequence. The first of `cu_seq_lens_q`, `seq_idx` and `position_ids` that is
given decides. With an `attention_mask`, its numbers decide, or `position_ids` if it has none. Each run of
padding in a packed row is a sequence of its own. Packing with a cache is an error: a
cache has one state per row.

With `cu_seq_lens_q` nothing waits for a GPU. With `seq_idx`, or `position_ids` alone, the host must wait for the
number of sequences, because it is the size of a tensor. Every padded batch has an `attention_mask`, so its values
are not read on a GPU: a packing in the mask, or in `position_ids` beside a mask, fails there with an assertion of
the device, or works with GKA_CHECK_VALUES=1.

Legend: B batch, T time, N sequences in all rows together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..nn.padding import check_mask
from ..nn.short_conv import sequence_of_tokens
from ..ops.checks import require, values_may_be_read
from ..ops.transforms import has_values


class Packing(NamedTuple):
    """The sequences of a packed batch.

    cu_seqlens: [N + 1] int64; sequence n has the tokens from cu_seqlens[n] to cu_seqlens[n + 1] - 1 of all rows,
        joined one after the other.
    positions: [B, T] int64, the position of each token in its sequence.
    """

    cu_seqlens: Tensor
    positions: Tensor

    def to(self, device: torch.device) -> Packing:
        """The same on a device; cu_seq_lens_q may be told on the CPU."""
        return Packing(*(x.to(device, non_blocking=True) for x in self))


def find_packing(
    shape: tuple[int, int],
    cu_seq_lens_q: Tensor | None,
    seq_idx: Tensor | None,
    position_ids: Tensor | None,
) -> Packing | None:
    """Find the sequences of a packed batch; None if every row is one sequence.

    Args:
        shape: (B, T).
        cu_seq_lens_q: [N + 1], int32 or int64.
        seq_idx: [B, T], integers.
        position_ids: [B, T] or [1, T], integers.

    Raises:
        ValueError: a shape does not fit; cu_seq_lens_q with more than one row.
    """
    B, T = shape
    if T == 0:
        return None
    if cu_seq_lens_q is not None:
        if B != 1:
            raise ValueError(f"cu_seq_lens_q is given with {B} rows; expected 1: concatenate the sequences")
        if cu_seq_lens_q.ndim != 1 or cu_seq_lens_q.shape[0] < 2:
            raise ValueError(f"cu_seq_lens_q has shape {tuple(cu_seq_lens_q.shape)}; expected [N + 1]")
        return _from_lengths(cu_seq_lens_q.long(), T)
    if seq_idx is not None:
        if tuple(seq_idx.shape) != shape:
            raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}; expected {shape}")
        return _from_inner_starts(seq_idx[:, 1:] != seq_idx[:, :-1], shape)
    if position_ids is not None:
        return _from_inner_starts(position_ids[:, 1:] <= position_ids[:, :-1], shape)
    return None


def find_packing_in_mask(attention_mask: Tensor, position_ids: Tensor | None) -> Packing | None:
    """Where the sequences are that a mask numbers, or positions beside a mask tell; None if every row is one.

    Args:
        attention_mask: [B, T], 0 for a pad, and 1 for a token or the number of its sequence.
        position_ids: [B, T] or [1, T], integers, or None.

    Raises:
        ValueError: the numbers do not rise or are none, or a pad stands within a sequence of a packed row.
    """
    if not values_may_be_read(attention_mask):
        refuse_packing(attention_mask, position_ids, "leave attention_mask out of a packed batch")
        return None
    shape = (attention_mask.shape[0], attention_mask.shape[1])
    if (attention_mask > 1).any():
        number = attention_mask
    elif position_ids is not None and (starts := _restarts(attention_mask, position_ids)).any():
        number = (starts.cumsum(1) + 1) * (attention_mask != 0)
    else:
        check_mask(attention_mask)
        return None
    last, seen = _last_real(attention_mask != 0)
    before = number.gather(1, last)
    adjacent = last == torch.arange(shape[1], device=last.device) - 1
    rises = (number > before) | ((number == before) & adjacent) | (number == 0) | ~seen
    if not (rises & (number >= 0) & (number == number.long())).all():
        raise ValueError(
            "attention_mask and position_ids tell sequences that are not in one piece; expected whole numbers "
            "that rise along a row, such as 1 1 2 2 3 0, with padding (0) between sequences only"
        )
    return _from_inner_starts(number[:, 1:] != number[:, :-1], shape)


def refuse_packing(attention_mask: Tensor | None, position_ids: Tensor | None, remedy: str) -> None:
    """ValueError for a packed batch, told in an attention_mask [B, T] or by position_ids [B or 1, T].

    On a GPU an assertion of the device.
    """
    if attention_mask is not None:
        check_mask(attention_mask, remedy)
    if position_ids is not None and position_ids.ndim == 2 and position_ids.shape[1] > 1:
        real = torch.ones_like(position_ids) if attention_mask is None else attention_mask
        message = f"position_ids do not rise along a row, as those of a packed batch; {remedy}"
        require(~_restarts(real, position_ids).any(), message)


def _last_real(real: Tensor) -> tuple[Tensor, Tensor]:
    """Of real [B, T] of bool: the index of the last real token before each token, or 0, and if there is one."""
    index = torch.arange(real.shape[1], device=real.device).expand_as(real)
    last = torch.where(real, index, -1).cummax(dim=1).values
    last = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    return last.clamp(min=0), last >= 0


def _restarts(attention_mask: Tensor, position_ids: Tensor) -> Tensor:
    """[B, T] of bool: real tokens whose position is not above that of the real token before."""
    real = attention_mask != 0
    last, seen = _last_real(real)
    position_ids = position_ids.expand(real.shape)
    return real & seen & (position_ids <= position_ids.gather(1, last))


def _from_lengths(cu_seqlens: Tensor, T: int) -> Packing:
    token = torch.arange(T, device=cu_seqlens.device)
    return Packing(cu_seqlens, (token - cu_seqlens[sequence_of_tokens(cu_seqlens, T)]).unsqueeze(0))


def _from_inner_starts(inner: Tensor, shape: tuple[int, int]) -> Packing | None:
    """inner: [B or 1, T - 1] of bool, whether a sequence starts at a token that is not its row's first."""
    B, T = shape
    if not torch.compiler.is_compiling() and not has_values(inner):
        return None  # shapes are all that is asked for, and they do not depend on it
    if not inner.any():
        return None
    starts = torch.nn.functional.pad(inner.expand(B, -1), (1, 0), value=True)
    token = torch.arange(T, device=inner.device).expand(B, -1)
    positions = token - torch.where(starts, token, 0).cummax(dim=1).values
    cu_seqlens = torch.nn.functional.pad(starts.flatten().nonzero().squeeze(1), (0, 1), value=B * T)
    return Packing(cu_seqlens, positions)
