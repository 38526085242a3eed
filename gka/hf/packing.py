"""Packed batches: several sequences behind each other in a row, told in any of the ways that collators use.

- `cu_seq_lens_q` [N + 1]: where the sequences of the only row start, and its length.
- `seq_idx` [B, T]: the number of each token's sequence; it changes where a sequence starts.
- `position_ids` [B, T], neither with a mask nor with a cache: 0 where a sequence starts.

Every row's first token starts a sequence. The first of the three that is there decides. With `cu_seq_lens_q`
nothing waits for a GPU. With the others the GPU has to say how many sequences there are, the size of a tensor.

Legend: B batch, T time, N sequences in all rows together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..nn.short_conv import sequence_of_tokens
from ..ops.transforms import has_values


class Packing(NamedTuple):
    """Where the sequences of a packed batch are.

    cu_seqlens: [N + 1] of int64: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] of the rows, one behind
        the other.
    positions: [B, T] of int64: of each token in its sequence.
    """

    cu_seqlens: Tensor
    positions: Tensor


def find_packing(
    shape: tuple[int, int],
    cu_seq_lens_q: Tensor | None,
    seq_idx: Tensor | None,
    position_ids: Tensor | None,
) -> Packing | None:
    """Where the sequences are, or None if every row is one sequence.

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
        return _from_inner_starts(position_ids[:, 1:] == 0, shape)
    return None


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
