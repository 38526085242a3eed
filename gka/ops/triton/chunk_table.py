"""Which tokens each chunk of the kernels has, in tables on the device, so that nothing waits for the device.

Chunks are numbered sequence by sequence. The table [NT, 2] has of each its first token and the end of its
sequence, in the flattened batch; offsets [N + 1] the first chunk of each sequence, and the number of all.

Legend: B batch, T time, N sequences, NT chunks, C their tokens.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .kept import capturing, to_keep


def even_chunks(B: int, T: int, C: int, every: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Chunk table [NT, 2], first chunks [B + 1], and `crossing_sequences`, of B sequences of T tokens.

    They are kept for later calls; a CUDA graph makes its own, because it may live longer than the kept ones.
    """
    return (_even_chunks if capturing(device) else _kept_even_chunks)(B, T, C, every, device)


@lru_cache(maxsize=64)
def _kept_even_chunks(B: int, T: int, C: int, every: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return to_keep(lambda: _even_chunks(B, T, C, every, device), device)


def _even_chunks(B: int, T: int, C: int, every: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    per_sequence = -(-T // C)
    sequence = torch.arange(B, device=device).unsqueeze(1) * T
    starts = sequence + torch.arange(per_sequence, device=device) * C
    table = torch.stack((starts, (sequence + T).expand_as(starts)), dim=-1)
    offsets = torch.arange(B + 1, device=device) * per_sequence
    return table.reshape(-1, 2).contiguous(), offsets, crossing_sequences(offsets, B * per_sequence, every)


def packed_chunks(cu_seqlens: Tensor, chunks: int, C: int) -> tuple[Tensor, Tensor]:
    """The same for a packed batch; `chunks` is at least their number, the table's rest is empty chunks."""
    edges = cu_seqlens.long()
    counts = (edges.diff() + C - 1) // C
    offsets = torch.cat((edges.new_zeros(1), counts.cumsum(0)))
    numbers = torch.arange(chunks, device=edges.device)
    sequence = torch.searchsorted(offsets[1:], numbers, right=True).clamp_max(counts.numel() - 1)
    starts = edges[sequence] + (numbers - offsets[sequence]) * C
    table = torch.stack((starts, edges[sequence + 1]), dim=1)
    return table.masked_fill((numbers >= offsets[-1]).unsqueeze(1), 0), offsets


def crossing_sequences(offsets: Tensor, chunks: int, every: int) -> Tensor:
    """Of every edge, one after `every` chunks each, the sequence that goes on there, or -1."""
    edges = torch.arange(0, chunks + every, every, device=offsets.device)
    sequence = torch.searchsorted(offsets[1:], edges, right=True)
    begin = offsets[sequence.clamp_max(offsets.shape[0] - 1)]
    return torch.where((sequence < offsets.shape[0] - 1) & (begin < edges), sequence, -1)
