"""One call of the op: its contiguous tensors, sizes, tables and workspace, which every stage takes.

Chunks are numbered sequence by sequence (`chunk_table.py`), so packed batches and plain ones are one case. The
states at all chunks would be larger than everything else: only those at every EDGE_EVERY-th chunk are kept
(`Saved.edge_kk`, `edge_kv`), and work is cut into parts of consecutive chunks that share one workspace.

Legend: B batch, T time, H query heads, Hk key/value heads, D key dim, V value dim, N sequences, NT chunks, C their
tokens; BD, BV blocks of D and V.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..solvers import node_steps
from ..types import Arguments, Saved
from . import config
from .chunk_table import crossing_sequences, even_chunks, packed_chunks
from .kept import to_keep

WORKSPACE_BYTES = 4 * 2**27  # of the states of one part, forwards; docs/kernels.md has the times of others
EDGE_EVERY = 64  # chunks between two states that are kept for the backward pass


class Part(NamedTuple):
    """Chunks first to last - 1; programs: one for each chunk and head."""

    number: int
    first: int
    last: int
    programs: int


class Pair(NamedTuple):
    """A tensor as hi + lo (see `kernels.arithmetic`); lo is hi where there is none."""

    hi: Tensor | None
    lo: Tensor | None


NO_PAIR = Pair(None, None)  # x and z where nothing is solved


class StatePairs(NamedTuple):
    """S_kk [chunks, H, D, D] and S_kv [chunks, H, D, V] of one part, or their gradients.

    kv stands in for kk where nothing is solved.
    """

    kk: Pair
    kv: Pair


class Edges(NamedTuple):
    """Both states at every EDGE_EVERY-th chunk, [edges, H, D, D | V], or their gradients at some."""

    kk: Tensor | None
    kv: Tensor | None


class Scales(NamedTuple):
    """1 / (norm + 1e-6) of queries [B, T, H] and keys [B, T, Hk], if they are normalised."""

    query: Tensor | None
    key: Tensor | None


class KeyWeights(NamedTuple):
    """Of keys at their chunk's end, in S_kk and S_kv [B, T, H] each, and the chunks' decays [NT, H]."""

    to_kk: Tensor
    to_kv: Tensor
    decay: Tensor


@cache  # a CUDA graph may read them as long as the process lives
def _node_table(
    solver_steps: tuple[int, ...], ridge_ratio: float, cg: bool, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Step sizes of all stages in a row, float32, none for conjugate gradient; where each stage starts, int32."""
    taus = [tau for n in solver_steps for tau in node_steps(n, ridge_ratio, smallest_last=True)]
    starts = [sum(solver_steps[:stage]) for stage in range(len(solver_steps) + 1)]

    def tables() -> tuple[Tensor | None, Tensor]:
        stages = torch.tensor(starts, device=device, dtype=torch.int32)
        return None if cg else torch.tensor(taus, device=device), stages

    return to_keep(tables, device)


class Call:
    """Tensors, sizes, tables and flags of one call."""

    def __init__(self, arguments: Arguments) -> None:
        a = contiguous(arguments)
        self.q, self.k, self.v, self.g = a.q, a.k, a.v, a.g
        self.alpha, self.beta, self.S_kk, self.S_kv = a.alpha, a.beta, a.S_kk, a.S_kv
        self.ridge_ratio, self.scale = a.ridge_ratio, a.scale
        self.device = a.q.device
        if not (a.q.is_cuda or config.INTERPRETED):
            raise ValueError(
                f'backend "triton" needs tensors on a GPU, not on {self.device}; leave `backend` out, or set '
                "TRITON_INTERPRET=1 in the environment to run the kernels through Triton's interpreter"
            )
        self.B, self.T, self.H, self.D = a.q.shape
        self.Hk, self.V = a.v.shape[2:]
        self.N, self.C = a.sequences, chunk_size(a)
        self.solve, self.normalize = bool(a.solver_steps), a.normalize_qk
        self.has_alpha, self.has_beta = a.alpha is not None, a.beta is not None
        self.has_initial = a.S_kv is not None
        self.config = config.config_for(a.q.dtype, self.D, self.V, self.C, config.capability(self.device))
        self.wide, self.BD, self.BV = self.config.wide, self.config.BD, self.config.BV
        self.blocks = -(-self.V // self.BV)
        self.state_type = torch.float32 if self.wide else torch.bfloat16
        self.solver_stages = len(a.solver_steps)
        self.cg, self.tolerance = a.solver == "cg", a.tolerance
        self.taus, self.stage_starts = _node_table(a.solver_steps, a.ridge_ratio, self.cg, self.device)
        self._cut_into_parts(a)

    def _cut_into_parts(self, a: Arguments) -> None:
        self.NT = chunk_count(a)
        if a.cu_seqlens is None:
            self.chunks, self.offsets, self.crossing = even_chunks(self.B, self.T, self.C, EDGE_EVERY, self.device)
        else:
            self.chunks, self.offsets = packed_chunks(a.cu_seqlens, self.NT, self.C)
            self.crossing = crossing_sequences(self.offsets, self.NT, EDGE_EVERY)
        per_edge = self.H * self.D * ((self.D if self.solve else 0) + self.V) * 4 * EDGE_EVERY
        length = max(1, WORKSPACE_BYTES // per_edge) * EDGE_EVERY
        self.parts = []
        for number, first in enumerate(range(0, max(self.NT, 1), length)):
            last = min(first + length, self.NT)
            self.parts.append(Part(number, first, last, (last - first) * self.H))
        self.part_chunks = self.parts[0].last  # the first part is the longest

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def empty_scalars(self) -> Tensor:
        """A number for every token and head, [B, T, H] float32."""
        return self.empty(self.B, self.T, self.H)

    def empty_rows(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of one part, [chunks, H, C, BD]."""
        return self.empty(self.part_chunks, self.H, self.C, self.BD, dtype=dtype)

    def with_lo(self, hi: Tensor, lo: torch.dtype = torch.int8) -> Pair:
        """hi and room for its lo."""
        return Pair(hi, hi if self.wide else torch.empty_like(hi, dtype=lo))

    def empty_states(self, kk_lo: torch.dtype = torch.int8) -> StatePairs:
        """Workspace for both states of one part."""
        shape = self.part_chunks, self.H, self.D
        kv_hi = self.empty(*shape, self.V, dtype=self.state_type)
        kv = self.with_lo(kv_hi)
        if not self.solve:
            return StatePairs(kv, kv)
        return StatePairs(self.with_lo(self.empty(*shape, self.D, dtype=self.state_type), kk_lo), kv)


class BackwardWorkspace:
    """What the stages of a backward pass hand to each other; of one part if not for all tokens.

    Of tokens, [B, T, H]: ydy_minus_zAx, sum_uv, sum_uv_end, and where a system is solved inner_zAx, w,
    sum_M_w_zeta, sum_pk (see the kernels `readout`, `state_gradients`, `local`). dy and z are rows of a part,
    scores [chunks, H, 4, C, C], decayed_inner [chunks, H, 2, D], sum_w_zeta2 [chunks, H].
    """

    def __init__(self, call: Call, saved: Saved) -> None:
        H, C, D = call.H, call.C, call.D
        self.states, self.d_states = call.empty_states(torch.bfloat16), call.empty_states()
        edges = (saved.edge_kk if call.solve else None, saved.edge_kv)
        self.edges = Edges(*edges)
        self.d_edges = Edges(*[None if e is None else call.empty(2, *e.shape[1:]) for e in edges])
        self.decayed_inner = call.empty(call.part_chunks, H, 2, D)
        self.ydy_minus_zAx, self.sum_uv, self.sum_uv_end = [call.empty_scalars() for _ in range(3)]
        self.scores = call.empty(call.part_chunks, H, 4, C, C, dtype=call.state_type)
        self.dy = call.empty_rows()
        self.x, self.norm = solution_pair(call, saved), saved.norm if call.solve else None
        self.z = call.with_lo(call.empty_rows(call.state_type)) if call.solve else NO_PAIR
        self.inner_zAx, self.w, self.sum_M_w_zeta, self.sum_pk = [
            call.empty_scalars() if call.solve else None for _ in range(4)
        ]
        self.sum_w_zeta2 = call.empty(call.part_chunks, H) if call.solve else None


def solution_pair(call: Call, saved: Saved) -> Pair:
    """`Saved.x` and `x_lo`."""
    if not call.solve:
        return NO_PAIR
    return Pair(saved.x, saved.x if call.wide else saved.x_lo)


def keys_and_values(call: Call, part: Part, scales: Scales, columns: int | None = None) -> dict[str, Any]:
    """Arguments of every kernel that reads the keys, values and gates of a part's chunks, by name.

    columns: of V at a time, if not the whole block.
    """
    BV = min(call.BV, columns or call.BV)
    return dict(
        k_ptr=call.k, v_ptr=call.v, g_ptr=call.g, beta_ptr=call.beta, key_scale_ptr=scales.key,
        chunk_ptr=call.chunks, first_chunk=part.first, H=call.H, Hk=call.Hk, D=call.D, V=call.V,
        C=call.C, BD=call.BD, BV=BV, BLOCKS=-(-call.V // BV),
        HAS_BETA=call.has_beta, NORMALIZE=call.normalize, WIDE=call.wide,
    )  # fmt: skip


def contiguous(arguments: Arguments) -> Arguments:
    """The same with every tensor contiguous."""
    tensors = [x if x is None else x.contiguous() for x in arguments[:9]]
    return Arguments._make((*tensors, *arguments[9:]))


def default_chunk_size(device: torch.device) -> int:
    """Tokens per chunk: 64 rows are what one group of warps multiplies at once."""
    return 64


def chunk_size(arguments: Arguments) -> int:
    """C."""
    return arguments.chunk_size or default_chunk_size(arguments.q.device)


def chunk_count(arguments: Arguments) -> int:
    """NT, or an upper bound that needs no look at `cu_seqlens`."""
    (B, T), C = arguments.q.shape[:2], chunk_size(arguments)
    return B * -(-T // C) if arguments.cu_seqlens is None else T // C + arguments.sequences


def empty_saved(arguments: Arguments) -> Saved:
    """What `forward` saves, uninitialised."""
    q, V, solve = arguments.q, arguments.v.shape[3], bool(arguments.solver_steps)
    H, D = q.shape[2:]
    edges = chunk_count(arguments) // EDGE_EVERY + 1
    in_pairs = q.dtype == torch.bfloat16
    return Saved(
        x=q.new_empty(q.shape, dtype=torch.bfloat16 if in_pairs else torch.float32) if solve else None,
        x_lo=q.new_empty(q.shape, dtype=torch.int8) if solve and in_pairs else None,
        norm=q.new_empty(q.shape[:3], dtype=torch.float32) if solve else None,
        edge_kk=q.new_empty(edges, H, D, D, dtype=torch.float32) if solve else None,
        edge_kv=q.new_empty(edges, H, D, V, dtype=torch.float32),
    )
