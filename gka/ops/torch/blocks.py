"""In which order the chunk-wise op works through its chunks.

Sequences are cut into chunks of C tokens. A *wave* holds the j-th chunk of several sequences, which can be
computed together; a *block* holds consecutive waves that fit a memory budget; a *group* holds the sequences
that go through the waves side by side. A group's sequences are sorted from long to short, so the sequences of
every wave are the first n of the group, and a state that is finished stays where it is.

A batch [B, T] is B sequences of T tokens; a packed batch is N sequences of any lengths: both are one case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Chunks that are computed together.

    starts, ends: of every chunk, the first token and one past the last of its sequence, in the flattened
        batch; chunks are ordered by wave.
    waves: (first chunk, one past the last chunk) of every wave, within the block.
    """

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    waves: tuple[tuple[int, int], ...]

    def tokens(self, chunk_size: int, padding: int, device: torch.device) -> Tensor:
        """Index [chunks, C] of every token in the flattened batch; `padding` past a sequence's end."""
        starts = torch.tensor(self.starts, device=device).unsqueeze(1)
        ends = torch.tensor(self.ends, device=device).unsqueeze(1)
        index = starts + torch.arange(chunk_size, device=device)
        return index.masked_fill(index >= ends, padding)


@dataclass(frozen=True)
class Group:
    """Sequences that are computed side by side: their numbers, long ones first, and their blocks."""

    sequences: tuple[int, ...]
    blocks: tuple[Block, ...]


def schedule(bounds: list[tuple[int, int]], chunk_size: int, chunks_per_block: int) -> Iterator[Group]:
    """Groups of sequences, each with its blocks in the order of time.

    Args:
        bounds: (start, end) of every sequence in the flattened batch; start == end is an empty one.
        chunk_size: C, tokens per chunk.
        chunks_per_block: about how many chunks are held at once, at least one.
    """
    longest_first = sorted(range(len(bounds)), key=lambda n: bounds[n][0] - bounds[n][1])
    for first in range(0, len(bounds), chunks_per_block):
        sequences = tuple(longest_first[first : first + chunks_per_block])
        yield Group(sequences, tuple(_blocks([bounds[n] for n in sequences], chunk_size, chunks_per_block)))


def _blocks(bounds: list[tuple[int, int]], chunk_size: int, chunks_per_block: int) -> Iterator[Block]:
    starts: list[int] = []
    ends: list[int] = []
    waves: list[tuple[int, int]] = []
    offset, active = 0, len(bounds)
    while True:
        while active and bounds[active - 1][0] + offset >= bounds[active - 1][1]:
            active -= 1
        if starts and (not active or len(starts) + active > chunks_per_block):
            yield Block(tuple(starts), tuple(ends), tuple(waves))
            starts, ends, waves = [], [], []
        if not active:
            return
        waves.append((len(starts), len(starts) + active))
        starts.extend(start + offset for start, _ in bounds[:active])
        ends.extend(end for _, end in bounds[:active])
        offset += chunk_size
