"""The tokens and the sequences that one rank holds of a batch: a plan, made once on the host.

The global row is cut into pieces. A rank holds one piece or two (`ContextParallel`): its segments. A piece with
tokens holds part of one or more sequences:

    tokens     0    1    2 | 3    4    5 | 6    7      three pieces
    sequences  a    a    b | b    b    b | b    c      the second continues b, and leaves it open for the third

A sequence without tokens counts to the piece in which the sequence before it ends.

Legend: T tokens of the global row, t tokens of this rank, N sequences of the global row.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_gather

Piece = tuple[int, int]


class Ranks(Protocol):
    """The ranks that share a row: a ContextParallel, which makes the shards."""

    group: dist.ProcessGroup
    size: int
    rank: int

    def agree(self, values: Mapping[str, object]) -> None:
        """Compare values by name with the other ranks; an error on every rank if they differ."""

    def pieces(self, rank: int) -> tuple[int, ...]:
        """The numbers of the pieces that a rank holds, in its order."""

    def holders(self) -> list[tuple[int, int]]:
        """For each piece of the global row the rank that holds it, and its place among this rank's pieces."""


@dataclass(frozen=True)
class Sequences:
    """The sequences of one rank, as numbers of the host. An empty segment has one empty sequence, with index -1.

    number: N.
    cu_seqlens: of the local sequences, over this rank's tokens; rises from 0 to t.
    indices: for each local sequence, its number in the global row.
    begins: for each local sequence, the token of the global row with which it begins, here or in an earlier piece.
    counts: how many local sequences each segment has, at least 1.
    continues: for each segment, whether its first sequence begins in an earlier piece.
    origins: for each segment, the piece in which its first sequence begins, or its own piece.
    pieces: for each segment, the number of its piece.
    open: for each segment, whether its last sequence goes on in a later piece.
    """

    number: int
    cu_seqlens: tuple[int, ...]
    indices: tuple[int, ...]
    begins: tuple[int, ...]
    counts: tuple[int, ...]
    continues: tuple[bool, ...]
    origins: tuple[int, ...]
    pieces: tuple[int, ...]
    open: tuple[bool, ...]


@dataclass(frozen=True)
class Shard:
    """This rank's part of one batch, made by `ContextParallel.shard`.

    context: the ContextParallel.
    tokens: T.
    segments: (start, stop) of this rank's tokens in the global row; one pair, or two with layout="zigzag".
    sequences: the local sequences; a row that is not packed is one sequence.
    packed: whether the row is packed.
    """

    context: Ranks
    tokens: int
    segments: tuple[Piece, ...]
    sequences: Sequences
    packed: bool = False
    _on_devices: dict[tuple[str, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _agreed: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @property
    def local_tokens(self) -> int:
        """t, the tokens of this rank."""
        return sum(stop - start for start, stop in self.segments)

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a global tensor, whose `dim` has size T."""
        self._check("x", x, dim, self.tokens)
        parts = [x.narrow(dim, start, stop - start) for start, stop in self.segments]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """The global tensor of the parts of all ranks, whose `dim` has size t. It has gradients.

        Every rank must call it, and must run the backward pass if one does. All ranks get the whole tensor, and
        the gradient of x is the sum of what all ranks send back.
        """
        self._check("x", x, dim, self.local_tokens)
        size, pieces = self.context.size, len(self.segments)
        stops = pieces_of(self.tokens, size * pieces)
        lengths = [
            [stops[piece][1] - stops[piece][0] for piece in self.context.pieces(rank)] for rank in range(size)
        ]
        longest = max(map(sum, lengths))
        rows = x.movedim(dim, 0)
        padding = rows.new_zeros(longest - rows.shape[0], *rows.shape[1:])
        everyone = all_gather(torch.cat([rows, padding]), self.context.group)
        parts = [everyone[rank, : sum(of_rank)].split(of_rank) for rank, of_rank in enumerate(lengths)]
        return torch.cat([parts[rank][place] for rank, place in self.context.holders()]).movedim(0, dim)

    def positions(self, device: torch.device | str) -> Tensor:
        """[t] int64, the position of each local token in its sequence; a row that is not packed is one sequence.

        Made at the first call for a device, and kept.
        """
        return self._kept("positions", torch.device(device))

    def cu_seqlens(self, device: torch.device | str) -> Tensor:
        """[local sequences + 1] int64, `sequences.cu_seqlens` on a device, kept like `positions`."""
        return self._kept("cu_seqlens", torch.device(device))

    def agree_once(self, call: str, values: Mapping[str, object]) -> None:
        """Compare the shapes of a kind of call with the other ranks, at its first call with this plan."""
        if torch.compiler.is_compiling() or call in self._agreed:
            return
        self._agreed.add(call)
        self.context.agree({"call": call, **values})

    def _kept(self, name: str, device: torch.device) -> Tensor:
        if (name, device) not in self._on_devices:
            made = self._make_positions() if name == "positions" else torch.tensor(self.sequences.cu_seqlens)
            if device.type == "cuda" and not torch.compiler.is_compiling():  # so that the copy waits for nothing
                made = made.pin_memory()
            self._on_devices[name, device] = made.to(device, non_blocking=True)
        return self._on_devices[name, device]

    def _make_positions(self) -> Tensor:
        tokens = torch.cat([torch.arange(start, stop) for start, stop in self.segments])
        lengths = torch.tensor(self.sequences.cu_seqlens).diff()
        return tokens - torch.tensor(self.sequences.begins).repeat_interleave(lengths)

    def _check(self, name: str, x: Tensor, dim: int, expected: int) -> None:
        if x.shape[dim] != expected:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {expected} in dim {dim}")


def pieces_of(T: int, number: int) -> list[Piece]:
    """A row of T tokens cut into `number` pieces, whose lengths differ by at most 1."""
    return [(n * T // number, (n + 1) * T // number) for n in range(number)]


def as_numbers(cu_seqlens: Tensor | Sequence[int]) -> list[int]:
    """cu_seqlens as numbers of the host; TypeError unless they are integers."""
    edges = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    if not isinstance(edges, list) or any(isinstance(edge, bool) or not isinstance(edge, int) for edge in edges):
        raise TypeError(f"cu_seqlens is {cu_seqlens!r}; expected a list or a tensor of integers, [N + 1]")
    return edges


def sequence_edges(edges: list[int], T: int) -> tuple[int, ...]:
    """cu_seqlens as a tuple; ValueError unless they rise from 0 to T."""
    if not edges or edges[0] != 0 or edges[-1] != T or edges != sorted(edges):
        raise ValueError(f"cu_seqlens is {edges}; expected to rise from 0 to T = {T}")
    return tuple(edges)


def sequences_of(pieces: list[Piece], numbers: tuple[int, ...], edges: tuple[int, ...]) -> Sequences:
    """The sequences of the pieces with these numbers; `edges` is the global cu_seqlens."""
    of_each = [_sequences_of_piece(pieces, number, edges) for number in numbers]
    lengths, indices, begins, continues, origins, is_open = zip(*of_each, strict=True)
    return Sequences(
        number=len(edges) - 1,
        cu_seqlens=tuple(accumulate(chain(*lengths), initial=0)),
        indices=tuple(chain(*indices)),
        begins=tuple(chain(*begins)),
        counts=tuple(map(len, indices)),
        continues=continues,
        origins=origins,
        pieces=numbers,
        open=is_open,
    )


def _sequences_of_piece(
    pieces: list[Piece], number: int, edges: tuple[int, ...]
) -> tuple[list[int], list[int], list[int], bool, int, bool]:
    """Of one piece: lengths, indices and begins of its sequences; continues, origin, open."""
    start, stop = pieces[number]
    found = _indices_in(start, stop, number, edges)
    if not found:
        return [0], [-1], [start], False, number, False
    lengths = [min(edges[n + 1], stop) - max(edges[n], start) for n in found]
    begin = edges[found[0]]
    continues = begin < start
    origin = bisect_right([end for _, end in pieces], begin) if continues else number
    return lengths, list(found), [edges[n] for n in found], continues, origin, edges[found[-1] + 1] > stop


def _indices_in(start: int, stop: int, number: int, edges: tuple[int, ...]) -> range:
    """The sequences of a piece; none for an empty piece, but all of a row without tokens for the first piece."""
    if start == stop:
        return range(len(edges) - 1) if number == edges[-1] == 0 else range(0)
    first = bisect_right(edges, start) - 1 if start else 0
    last = bisect_left(edges, stop) - 1
    if edges[last + 1] == stop:  # it ends here, and so do those without tokens behind it
        last = bisect_right(edges, stop) - 2
    return range(first, last + 1)
