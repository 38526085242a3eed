"""The op by Triton kernels: what is launched, on which workspace, with which sizes.

Chunks are numbered sequence by sequence (`chunk_table.py`), so packed batches and plain ones are one case. The
states at all chunks would be larger than everything else: only those at every EDGE_EVERY-th chunk are kept
(`Saved.edge_kk`, `edge_kv`), and work is cut into parts of consecutive chunks that share one workspace, for which
each part's states are scanned from there.

    forward     scan_states (sums of spans), join_edges                                                    at once
                scan_states, solve_chunks, read_states                                               part by part
    backward    scan_states, read_gradients, solve_chunks, query_gradients, increments_kk, increments_kv,
                scan_gradients, value_gradients, key_gradients                           parts from last to first

Legend: B batch, T time, H query heads, Hk key/value heads, D key dim, V value dim, N sequences, NT chunks, C their
tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..solvers import node_steps
from ..types import Gradients, Inputs, Options, Outputs, Saved
from .chunk_table import crossing_sequences, even_chunks, packed_chunks
from .config import INTERPRETED, Config, capability, config_for
from .kernels.local import key_gradients, value_gradients
from .kernels.prepare import scales_of_rows, weigh_tokens
from .kernels.readout import query_gradients, read_gradients, read_states
from .kernels.solve import solve_chunks
from .kernels.state import increments_kk, increments_kv, join_edges, scan_gradients, scan_states
from .launch import both, can_compile_side_by_side, compiling_ahead, launch, on_device, side_by_side

WORKSPACE_BYTES = 9 * 2**27  # of the states of one part, forwards; 9: 34.9 rounds of an H200 at H 16, D = V = 128
EDGE_EVERY = 64  # chunks between two states that are kept for the backward pass


def default_chunk_size(device: torch.device) -> int:
    """Tokens per chunk: 64 rows are what one group of warps multiplies at once."""
    return 64


@lru_cache(maxsize=64)
def _node_table(solver_steps: tuple[int, ...], ridge_ratio: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Step sizes of all stages in a row, float32, and where each stage starts, int32."""
    taus = [tau for n in solver_steps for tau in node_steps(n, ridge_ratio)]
    starts = [sum(solver_steps[:stage]) for stage in range(len(solver_steps) + 1)]
    return torch.tensor(taus, device=device), torch.tensor(starts, device=device, dtype=torch.int32)


@dataclass
class _Call:
    """Sizes, tables and flags of one call of the op."""

    inputs: Inputs
    options: Options

    def __post_init__(self) -> None:
        inputs, C = self.inputs, self.options.chunk_size
        q = inputs.q
        if not (q.is_cuda or INTERPRETED):
            raise ValueError(
                f'backend "triton" needs tensors on a GPU, not on {q.device}; leave `backend` out, or set '
                "TRITON_INTERPRET=1 in the environment to run the kernels through Triton's interpreter"
            )
        self.B, self.T, self.H, self.D = q.shape
        self.Hk, self.V = inputs.v.shape[2:]
        self.N, self.solve = inputs.sequences, bool(self.options.solver_steps)
        self.config: Config = config_for(q.dtype, self.D, self.V, C, capability(q.device))
        self.NT = chunk_count(inputs, C)
        if inputs.cu_seqlens is None:
            self.chunks, self.offsets, self.crossing = even_chunks(self.B, self.T, C, EDGE_EVERY, q.device)
        else:
            self.chunks, self.offsets = packed_chunks(inputs.cu_seqlens, self.NT, C)
            self.crossing = crossing_sequences(self.offsets, self.NT, EDGE_EVERY)
        self.taus, self.stages = _node_table(self.options.solver_steps, self.options.ridge_ratio, q.device)
        per_part = part_length(inputs, self.options)
        self.parts = [(n, min(n + per_part, self.NT)) for n in range(0, max(self.NT, 1), per_part)]
        self.part_chunks = self.parts[0][1]  # the first part is the longest
        self.state_type = torch.float32 if self.config.wide else torch.bfloat16

    def flags(self, *names: str) -> dict[str, bool]:
        """Constexprs by name."""
        inputs = self.inputs
        known = {
            "SOLVE": self.solve,
            "HAS_ALPHA": inputs.alpha is not None,
            "HAS_BETA": inputs.beta is not None,
            "NORMALIZE": self.options.normalize_qk,
            "HAS_INITIAL": inputs.S_kv is not None,
        }
        return {name: known[name] for name in names}

    @property
    def arithmetic(self) -> dict[str, Any]:
        return {"C": self.options.chunk_size, "WIDE": self.config.wide}

    @property
    def blocks(self) -> dict[str, int]:
        """Constexprs of kernels that go through V in blocks."""
        return {"BD": self.config.BD, "BV": self.config.BV, "BLOCKS": -(-self.V // self.config.BV)}

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.inputs.q.device)

    def states(self) -> tuple[Tensor, Tensor]:
        """Workspace of one part for S_kk and S_kv; S_kv stands in for the former where nothing is solved."""
        shape = self.part_chunks, self.H, self.D
        kv = self.empty(*shape, self.V, dtype=self.state_type)
        return self.empty(*shape, self.D, dtype=self.state_type) if self.solve else kv, kv

    def state_pairs(self, kk_lo: torch.dtype = torch.int8) -> list[Tensor]:
        """The same in pairs: S_kk, its lo, S_kv, its lo."""
        kk, kv = self.states()
        kv_pair = self.pair(kv)
        return [*(self.pair(kk, kk_lo) if self.solve else kv_pair), *kv_pair]

    def pair(self, hi: Tensor, lo: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
        """hi and room for its lo, which is hi where there is none."""
        return hi, hi if self.config.wide else torch.empty_like(hi, dtype=lo)

    def local(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Workspace for rows of one part, [chunks, H, C, BD]."""
        return self.empty(self.part_chunks, self.H, self.options.chunk_size, self.config.BD, dtype=dtype)

    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """1 / (norm + 1e-6) of queries [B, T, H] and keys [B, T, Hk], if they are normalised."""
        if not self.options.normalize_qk:
            return None, None
        found = []
        for rows in (self.inputs.q, self.inputs.k):
            scale, count = self.empty(*rows.shape[:3]), rows.shape[:3].numel()
            if count:
                launch(
                    scales_of_rows, triton.cdiv(count, 16), rows, scale, count, self.D, ROWS=16, BD=self.config.BD
                )
            found.append(scale)
        return found[0], found[1]

    def weights(self, key_scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of keys at their chunk's end, in S_kk and S_kv [B, T, H] each, and decays [NT, H]."""
        B, T, H = self.inputs.g.shape
        to_kk, to_kv, decay = self.empty(B, T, H), self.empty(B, T, H), self.empty(self.NT, H)
        if self.NT * H:
            launch(weigh_tokens, self.NT * H,
                self.inputs.g, self.inputs.beta, key_scale, to_kk, to_kv, decay, self.chunks, H, self.Hk,
                C=self.options.chunk_size, **self.flags("HAS_BETA", "NORMALIZE"), num_warps=1,
            )  # fmt: skip
        return to_kk, to_kv, decay

    def scan(
        self, chunks: tuple[int, int], weights: tuple[Tensor, Tensor, Tensor],
        edges: tuple[Tensor | None, Tensor | None, Tensor | None], final: tuple[Tensor | None, Tensor | None],
        states: Sequence[Tensor | None] | None,
    ) -> None:  # fmt: skip
        """Scan the states of chunks first to last from the edges; without `states`, for the edges alone."""
        inputs, config, (first, last) = self.inputs, self.config, chunks
        if states is None:
            (BM, BN), warps = config.span_tile, config.spans
        else:
            (BM, BN), warps = config.tile, config.scan
        columns = (-(-self.D // BN) if self.solve else 0) + -(-self.V // BN)
        tiles, spans = -(-self.D // BM) * columns, -(-max(1, last - first) // EDGE_EVERY)
        if not tiles * self.H * self.N:
            return
        launch(scan_states, tiles * self.H * (spans if states is None else self.N + spans),
            inputs.k, inputs.v, *weights, *both(inputs.S_kk, inputs.S_kv), *both(*final),
            *both(*edges[:2]), edges[2], *(states if states is not None else 4 * (None,)),
            self.chunks, self.offsets, self.crossing, first, last, self.NT, self.N, self.H, self.Hk,
            self.D, self.V, tiles, BM=BM, BN=BN, EVERY=EDGE_EVERY, PIPELINE=config.pipeline,
            SUM_ONLY=states is None, HAS_FINAL=final[1] is not None,
            **self.flags("SOLVE", "HAS_INITIAL"), **self.arithmetic, **warps,
        )  # fmt: skip

    def find_edges(
        self, weights: tuple[Tensor, Tensor, Tensor], edges: tuple[Tensor | None, Tensor | None]
    ) -> None:
        """Fill in the states at every EDGE_EVERY-th chunk."""
        count = self.NT // EDGE_EVERY + 1
        if self.NT <= EDGE_EVERY and not compiling_ahead():
            return
        fade = self.empty(count, self.H)
        self.scan((0, self.NT), weights, (*edges, fade), (None, None), None)
        for edge in edges:
            elements = 0 if edge is None else edge.shape[2] * edge.shape[3]
            if elements:
                launch(
                    join_edges,
                    triton.cdiv(elements, 512) * self.H,
                    edge,
                    fade,
                    count,
                    self.H,
                    elements,
                    BLOCK=512,
                    num_warps=4,
                )

    def solve_part(
        self, part: int, rhs: Tensor, x: tuple[Tensor, Tensor], scales: tuple[Tensor | None, Tensor | None],
        norm: Tensor, states: Sequence[Tensor | None], adjoint: tuple[Tensor | None, ...] | None = None,
    ) -> None:  # fmt: skip
        """x = A^{-1} rhs, times the first of `scales`, as a pair; the second one is that of keys.

        Rows are those of tokens, or of the part if `adjoint`: a pair y, and where <A x, y> goes.
        """
        (first, last), inputs = self.parts[part], self.inputs
        launch(solve_chunks, (last - first) * self.H,
            rhs, *x, inputs.k, inputs.g, scales[0], inputs.beta, scales[1], norm, states[0], states[1],
            *(adjoint or 3 * (None,)), self.taus, self.stages, self.chunks, self.options.ridge_ratio, first,
            self.H, self.Hk, self.D, BD=self.config.BD, STAGES=len(self.options.solver_steps),
            ADJOINT=adjoint is not None, HAS_SCALE=scales[0] is not None,
            **self.flags("HAS_BETA", "NORMALIZE"), **self.arithmetic, **self.config.solve,
        )  # fmt: skip


def _edge(edges: list[Tensor | None], part: int) -> list[Tensor | None]:
    return [None if tensor is None else tensor[part % tensor.shape[0]] for tensor in edges]


def chunk_count(inputs: Inputs, C: int) -> int:
    """NT, or an upper bound that needs no look at `cu_seqlens`."""
    B, T = inputs.q.shape[:2]
    return B * -(-T // C) if inputs.cu_seqlens is None else T // C + inputs.sequences


def part_length(inputs: Inputs, options: Options) -> int:
    """Chunks of one part, a multiple of EDGE_EVERY."""
    H, D, V = inputs.q.shape[2], inputs.q.shape[3], inputs.v.shape[3]
    per_edge = H * D * ((D if options.solver_steps else 0) + V) * 4 * EDGE_EVERY
    return max(1, WORKSPACE_BYTES // per_edge) * EDGE_EVERY


def empty_saved(inputs: Inputs, options: Options) -> Saved:
    """What `forward` saves, uninitialised."""
    q, V, solve = inputs.q, inputs.v.shape[3], bool(options.solver_steps)
    H, D = q.shape[2:]
    edges = chunk_count(inputs, options.chunk_size) // EDGE_EVERY + 1
    in_pairs = q.dtype == torch.bfloat16
    return Saved(
        q.new_empty(q.shape, dtype=torch.bfloat16 if in_pairs else torch.float32) if solve else None,
        q.new_empty(q.shape, dtype=torch.int8) if solve and in_pairs else None,
        q.new_empty(q.shape[:3], dtype=torch.float32) if solve else None,
        q.new_empty(edges, H, D, D, dtype=torch.float32) if solve else None,
        q.new_empty(edges, H, D, V, dtype=torch.float32),
    )


def _contiguous(inputs: Inputs) -> Inputs:
    return inputs._replace(
        **{name: tensor.contiguous() for name, tensor in inputs._asdict().items() if tensor is not None}
    )


_seen: set[tuple[Any, ...]] = set()  # calls whose kernels are compiled
_compiling = threading.Lock()


def compile_ahead(inputs: Inputs, options: Options, output_final_state: bool, save: bool) -> None:
    """Compile the kernels of a call like this, and of its backward pass if `save`, unless that was done."""
    shapes = tuple(None if x is None else (x.shape[2:], x.dtype) for x in inputs[:8])
    numbers = (len(options.solver_steps), options.chunk_size, options.normalize_qk, output_final_state, save)
    key = (inputs.q.device, shapes, numbers)
    if key in _seen or compiling_ahead():
        return
    tensors: list[Any] = [None if x is None else x.new_empty(1, 1, *x.shape[2:]) for x in inputs[:6]]
    tensors += [None if x is None else x.new_empty(1, *x.shape[1:]) for x in inputs[6:8]]
    like = Inputs._make([*tensors, None])
    with _compiling:
        if key not in _seen and can_compile_side_by_side():
            with side_by_side():
                out = forward(like, options, output_final_state, save)
                if save:
                    final = [out.o.new_empty(0) if x is None else x for x in (out.S_kk, out.S_kv)]
                    backward(like, options, out.saved, (final[0], final[1]), out.o, (None, None))
        _seen.add(key)


def forward(inputs: Inputs, options: Options, output_final_state: bool, save: bool) -> Outputs:
    """The op; `save` keeps what `backward` needs."""
    if not INTERPRETED:
        compile_ahead(inputs, options, output_final_state, save)
    inputs = _contiguous(inputs)
    call, saved = _Call(inputs, options), empty_saved(inputs, options)
    o = call.empty(call.B, call.T, call.H, call.V, dtype=inputs.q.dtype)
    final_kk = final_kv = None
    if output_final_state:
        final_kv = call.empty(call.N, call.H, call.D, call.V)
        final_kk = call.empty(call.N, call.H, call.D, call.D) if call.solve else None
    with on_device(inputs.q.device):
        states, edges = call.state_pairs(torch.bfloat16), (saved.edge_kk, saved.edge_kv)
        x, x_lo = saved.x, saved.x if saved.x_lo is None else saved.x_lo
        query_scale, key_scale = call.scales()
        weights = call.weights(key_scale)
        call.find_edges(weights, edges)
        for part, (first, last) in enumerate(call.parts):
            call.scan((first, last), weights, (*edges, None), (final_kk, final_kv), states)
            programs = (last - first) * call.H
            if not programs:
                continue
            if x is not None and x_lo is not None and saved.norm is not None:
                scales = (query_scale, key_scale)
                call.solve_part(part, inputs.q, (x, x_lo), scales, saved.norm, states)
            launch(read_states, programs,
                inputs.q, inputs.k, inputs.v, inputs.g, inputs.alpha, inputs.beta, query_scale, key_scale,
                x, x_lo, *states[2:], o, call.chunks, options.scale, first, call.H, call.Hk, call.D, call.V,
                **call.flags("SOLVE", "HAS_ALPHA", "HAS_BETA", "NORMALIZE"),
                **call.blocks, **call.arithmetic, **call.config.read,
            )  # fmt: skip
    return Outputs(o, final_kk, final_kv, saved if save else Saved())


def backward(
    inputs: Inputs,
    options: Options,
    saved: Saved,
    final: tuple[Tensor, Tensor],
    do: Tensor,
    d_final: tuple[Tensor | None, Tensor | None],
) -> Gradients:
    """Gradients of the inputs from those of o and of the final states, which are not looked at themselves."""
    inputs, do = _contiguous(inputs), do.contiguous()
    call = _Call(inputs, options)
    q, k, v, g, beta = inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta
    H, Hk, D, V, C = call.H, call.Hk, call.D, call.V, options.chunk_size
    has_final = any(tensor is not None for tensor in d_final)
    d_given: list[Tensor | None] = [None, None]
    if has_final:
        d_given = [
            (torch.zeros_like(state) if given is None else given.contiguous()) if state.numel() else None
            for state, given in zip(final, d_final, strict=True)
        ]
    dq, dg = torch.empty_like(q), torch.empty_like(g)
    dk = call.empty(call.B, call.T, H, D, dtype=q.dtype)
    dv = call.empty(call.B, call.T, H, V, dtype=q.dtype)
    dalpha, dbeta, dS_kk, dS_kv = (
        None if tensor is None else torch.empty_like(tensor)
        for tensor in (inputs.alpha, inputs.beta, inputs.S_kk, inputs.S_kv)
    )
    if not call.solve and dalpha is not None:
        dalpha.zero_()
    with on_device(q.device):
        states, d_states = call.state_pairs(torch.bfloat16), call.state_pairs()
        query_scale, key_scale = call.scales()
        weights = call.weights(key_scale)
        edges = (saved.edge_kk if call.solve else None, saved.edge_kv)
        d_edges = [None if e is None else call.empty(2, *e.shape[1:]) for e in edges]
        through = call.empty(call.part_chunks, H, 2, D)
        rest, written, written_end = (call.empty(call.B, call.T, H) for _ in range(3))
        scores = call.empty(call.part_chunks, H, 4, C, C, dtype=call.state_type)
        dy = call.local()
        x = x_lo = z = z_lo = energy = w = b = along = pull = None
        if call.solve and saved.x is not None:
            x, x_lo = saved.x, saved.x if call.config.wide else saved.x_lo
            z, z_lo = call.pair(call.local(call.state_type))
            energy, w, b, along = (torch.empty_like(rest) for _ in range(4))
            pull = call.empty(call.part_chunks, H)
        per_block, blocks = call.config.BD // call.config.half, call.blocks["BLOCKS"]
        tiles_kk, tiles_kv = -(-D // call.config.rows) if call.solve else 0, -(-D // call.config.rows)
        for part in reversed(range(len(call.parts))):
            first, last = call.parts[part]
            programs = (last - first) * H
            call.scan((first, last), weights, (*edges, None), (None, None), states)
            if programs:
                launch(read_gradients, programs,
                    k, v, g, beta, key_scale, do, *states[2:], dy, call.chunks, options.scale,
                    first, H, Hk, D, V, **call.flags("HAS_BETA", "NORMALIZE"),
                    **call.blocks, **call.arithmetic, **call.config.read,
                )  # fmt: skip
                if z is not None and z_lo is not None and saved.norm is not None:
                    call.solve_part(
                        part, dy, (z, z_lo), (inputs.alpha, key_scale), saved.norm, states,
                        adjoint=(x, x_lo, energy),
                    )  # fmt: skip
                launch(query_gradients, programs * (C // call.config.share),
                    q, inputs.alpha, query_scale, x, x_lo, saved.norm, dy, z, z_lo, energy,
                    dq, dalpha, w, rest, call.chunks, options.ridge_ratio, first, H, D,
                    C=C, BD=call.config.BD, ROWS=call.config.share, WIDE=call.config.wide,
                    **call.flags("SOLVE", "HAS_ALPHA", "NORMALIZE"), **call.config.rowwise,
                )  # fmt: skip
                if call.solve:
                    launch(increments_kk, programs * per_block,
                        k, x, x_lo, z, z_lo, g, beta, key_scale, w, *d_states[:2], b, pull,
                        call.chunks, first, H, Hk, D, BD=call.config.BD, HALF=call.config.half,
                        **call.flags("HAS_BETA", "NORMALIZE"), **call.arithmetic, **call.config.increments_kk,
                    )  # fmt: skip
                launch(increments_kv, programs * blocks,
                    q, x, x_lo, do, g, inputs.alpha, query_scale, *d_states[2:], call.chunks, options.scale,
                    first, H, D, V, blocks, BD=call.config.BD, BV=call.config.BV,
                    **call.flags("SOLVE", "HAS_ALPHA", "NORMALIZE"), **call.arithmetic, **call.config.increments,
                )  # fmt: skip
            if H * call.N:
                launch(scan_gradients, (tiles_kk + tiles_kv) * H * call.N,
                    weights[2], pull, states[0], states[2], *both(*d_given), *both(dS_kk, dS_kv),
                    *both(*_edge(d_edges, part + 1)), *both(*_edge(d_edges, part)),
                    *d_states, through, call.offsets, first, last, H, D, V, tiles_kk, tiles_kv,
                    BM=call.config.rows, BV=call.config.wide_row, HAS_FINAL=has_final,
                    WIDE=call.config.wide, **call.flags("SOLVE", "HAS_INITIAL"), **call.config.gradients,
                )  # fmt: skip
            if programs:
                sizes = (first, H, Hk, D, V)
                flags: dict[str, Any] = call.flags("SOLVE", "HAS_ALPHA", "HAS_BETA", "NORMALIZE")
                flags |= {**call.blocks, **call.arithmetic, **call.config.local}
                launch(value_gradients, programs,
                    q, k, v, g, inputs.alpha, beta, query_scale, key_scale, x, x_lo, z, z_lo, do, w, *d_states[2:],
                    dv, scores, written, written_end, along, call.chunks, options.scale, *sizes, **flags,
                )  # fmt: skip
                launch(key_gradients, programs,
                    q, k, v, g, beta, key_scale, x, z, b, rest, written, written_end, along, scores,
                    states[0], *d_states, through, dk, dg, dbeta, call.chunks, *sizes, **flags,
                )  # fmt: skip
    dk, dv = (_sum_groups(tensor, Hk) for tensor in (dk, dv))
    return Gradients(dq, dk, dv, dg, dalpha, dbeta, dS_kk, dS_kv)


def _sum_groups(tensor: Tensor, Hk: int) -> Tensor:
    """[B, T, H, .] summed over the query heads of each key/value head, in float32."""
    if tensor.shape[2] == Hk:
        return tensor
    return tensor.unflatten(2, (Hk, -1)).sum(3, dtype=torch.float32).to(tensor.dtype)
