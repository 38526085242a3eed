"""Which ranks share the tokens of a row, and who holds which.

    contiguous    rank r of n holds the tokens r T // n to (r + 1) T // n - 1
    zigzag        the row is cut into 2 n equal pieces; rank r holds piece r, then piece 2 n - 1 - r

In causal softmax attention a later token costs more. Zigzag gives every rank the same share of that cost. A GKA
layer costs the same for every token.

Legend: T tokens of the global row, n ranks, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .agreement import Values, agree
from .shard import Shard, as_numbers, pieces_of, sequence_edges, sequences_of

Layout = Literal["contiguous", "zigzag"]
LAYOUTS: tuple[str, ...] = get_args(Layout)


class ContextParallel:
    """A group of ranks that share the tokens of every row.

    Args:
        group_or_mesh: a torch.distributed.ProcessGroup, or a DeviceMesh with one dim. This process is in it.
        layout: "contiguous" or "zigzag"; the docstring of the module says which tokens a rank holds.

    Attributes:
        group: the ProcessGroup.
        size: number of ranks.
        rank: number of this rank in the group.
        layout: as given.

    Raises:
        TypeError: group_or_mesh is neither a group nor a mesh.
        ValueError: the mesh has several dims, this process is not in the group, or there is no such layout.

    A copy by `copy.deepcopy` shares the group.
    """

    def __init__(self, group_or_mesh: dist.ProcessGroup | DeviceMesh, layout: Layout = "contiguous") -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}; expected one of {LAYOUTS}")
        if isinstance(group_or_mesh, DeviceMesh):
            if group_or_mesh.ndim != 1:
                raise ValueError(
                    f"group_or_mesh is a mesh with the dims {group_or_mesh.mesh_dim_names or group_or_mesh.ndim}; "
                    "expected one dim, such as mesh['cp']"
                )
            group_or_mesh = group_or_mesh.get_group()
        if not isinstance(group_or_mesh, dist.ProcessGroup):
            raise TypeError(
                f"group_or_mesh is a {type(group_or_mesh).__name__}; expected a torch.distributed.ProcessGroup "
                "that this process is in, or a DeviceMesh"
            )
        self.group, self.layout = group_or_mesh, layout
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)

    def shard(self, T: int, cu_seqlens: Tensor | Sequence[int] | None = None) -> Shard:
        """Plan one batch. Every rank calls this with the same numbers; the hosts compare them (`agreement`).

        Args:
            T: tokens of the global row.
            cu_seqlens: N + 1 integers that rise from 0 to T, for a packed row of N sequences. A tensor on a GPU is
                read here, once, and the call waits for it; pass a list or a CPU tensor to avoid the wait.

        Raises:
            TypeError: T or a value of cu_seqlens is not an integer.
            ValueError: T is negative, cu_seqlens does not rise from 0 to T, or T does not divide into 2 n equal
                pieces with layout="zigzag".
            RanksDisagree: another rank has another T, cu_seqlens or layout.
        """
        if isinstance(T, bool) or not isinstance(T, int):
            raise TypeError(f"T is {T!r}; expected an integer")
        numbers = None if cu_seqlens is None else as_numbers(cu_seqlens)
        self.agree({"call": "shard", "T": T, "cu_seqlens": numbers, "layout": self.layout})
        if T < 0:
            raise ValueError(f"T is {T}; expected at least 0")
        if self.layout == "zigzag" and T % (2 * self.size):
            raise ValueError(
                f"T is {T}; expected a multiple of {2 * self.size}, two pieces for each of {self.size} processes, "
                "with layout='zigzag'"
            )
        edges = (0, T) if numbers is None else sequence_edges(numbers, T)
        pieces = pieces_of(T, self.size if self.layout == "contiguous" else 2 * self.size)
        mine = self.pieces(self.rank)
        return Shard(
            self,
            T,
            tuple(pieces[number] for number in mine),
            sequences_of(pieces, mine, edges),
            packed=cu_seqlens is not None,
        )

    def agree(self, values: Values) -> None:
        """Compare values by name with the other ranks. Every rank calls this, and nothing waits for a GPU.

        Raises:
            RanksDisagree: they differ; the message names the ranks and their values.
        """
        agree(self.group, values)

    def pieces(self, rank: int) -> tuple[int, ...]:
        """The numbers of the pieces of the global row that a rank holds, in its order."""
        return (rank,) if self.layout == "contiguous" else (rank, 2 * self.size - 1 - rank)

    def holders(self) -> list[tuple[int, int]]:
        """For each piece of the global row the rank that holds it, and its place among this rank's pieces."""
        found = {piece: (rank, n) for rank in range(self.size) for n, piece in enumerate(self.pieces(rank))}
        return [found[piece] for piece in range(len(found))]

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextParallel:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a ContextParallel cannot be pickled, because its group belongs to this process; make a new one where "
            "the layers are loaded"
        )
