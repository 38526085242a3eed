"""The chunk-wise op as plain PyTorch, for every derivative: torch.func, forward mode, gradients of gradients.

The equations are those of `chunk_math`. Autograd records them; `chunk_solve` differentiates the solve implicitly.
Nothing is written in place and no value is read but the length of the longest packed sequence, so torch.vmap maps
all of it. Autograd keeps what enters each product: more memory than `chunked`, whose backward pass computes most
of it anew.

Legend: B batch, T time, H query heads, Hk key/value heads, R = H / Hk, D key dim, V value dim, N sequences,
L tokens of the longest one, C tokens per chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..autocast import autocast_off
from ..solvers import floored, root
from ..transforms import has_values, unwrapped
from ..types import Arguments, Outputs, Saved, state_dtype
from .chunk_math import Chunks, readout, smooth_unit_rows, squared_norm
from .chunk_solve import chunk_solve
from .chunked_inputs import default_chunk_size

__all__ = ["backward", "default_chunk_size", "empty_saved", "forward"]


def forward(arguments: Arguments, *, output_final_state: bool, save: bool) -> Outputs:
    """The op; it saves nothing, autograd does."""
    with autocast_off(arguments.q.device):
        o, S_kk, S_kv = _chunk_by_chunk(arguments)
    if not output_final_state:
        S_kk = S_kv = None
    return Outputs(o, S_kk, S_kv, Saved())


backward = None  # autograd differentiates `forward`


def empty_saved(arguments: Arguments) -> Saved:
    return Saved()


def _chunk_by_chunk(a: Arguments) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """o [B, T, H, V] and the final states; S_kk is None where nothing is solved."""
    rows = Rows(a)
    (H, D), V = a.q.shape[2:], a.v.shape[3]
    Q, K, Vv = rows.read(a.q), rows.read(a.k).squeeze(1), rows.read(a.v).squeeze(1)
    if a.normalize_qk:
        Q, K = smooth_unit_rows(Q), smooth_unit_rows(K)
    g, alpha = rows.read(a.g), None if a.alpha is None else rows.read(a.alpha)
    weight = torch.ones_like(g) if a.beta is None else rows.read(a.beta).square()
    g, weight = rows.zero_at_padding(g), rows.zero_at_padding(weight)
    if a.tolerance is not None:  # padding must keep no chunk going
        Q = rows.zero_at_padding(Q)
    S_kk, S_kv = rows.state(a.S_kk, D), rows.state(a.S_kv, V)
    S_kk = 0.5 * (S_kk + S_kk.transpose(-1, -2))
    C = a.chunk_size or default_chunk_size(a.q.device)
    outputs = []
    for start in range(0, rows.length, C):
        part = slice(start, start + C)
        chunks = Chunks.build(K[:, part], Vv[:, part], g[:, :, part], weight[:, :, part])
        Y = Q[:, :, part]
        decay = chunks.zeta[..., -1:].unsqueeze(-1)
        if a.solver_steps:
            X = _solve(chunks, S_kk, Y, a)
            Y = X if alpha is None else torch.lerp(Y, X, alpha[:, :, part].unsqueeze(-1))
            S_kk = decay * S_kk + chunks.increment(chunks.K)
        outputs.append(a.scale * readout(chunks, S_kv, Y))
        S_kv = decay * S_kv + chunks.increment(chunks.Vv)
    o = torch.cat(outputs, dim=2) if outputs else Q.new_zeros(*Q.shape[:3], V)
    final_kk = S_kk.reshape(rows.N, H, D, D) if a.solver_steps else None
    return rows.write(o).to(a.q.dtype), final_kk, S_kv.reshape(rows.N, H, D, V)


def _solve(chunks: Chunks, S_kk: Tensor, Q: Tensor, a: Arguments) -> Tensor:
    """X [b, R, C, D] from the state before the chunk."""
    squared = squared_norm(chunks, S_kk, torch.matmul(chunks.K.unsqueeze(1), S_kk))
    norm = floored(root(squared))
    return chunk_solve(Q, chunks.K, S_kk, chunks.Mb, chunks.zeta, norm, a.ridge_ratio, a.plan)


class Rows:
    """The tokens of a call as one row for each sequence, [N * Hk, R, L, ...] in the compute dtype.

    length: L. Packed sequences shorter than L are padded behind.
    """

    def __init__(self, a: Arguments) -> None:
        self.q, self.Hk, self.N, self.length = a.q, a.v.shape[2], a.sequences, a.q.shape[1]
        self.dtype = state_dtype(a.q.dtype)
        self.index: Tensor | None = None
        if a.cu_seqlens is not None:
            self._unpack(a.cu_seqlens.long(), a.q.shape[1])

    def _unpack(self, edges: Tensor, T: int) -> None:
        """Where the tokens of the rows lie in the packed one, and back."""
        lengths, numbers = edges[1:] - edges[:-1], unwrapped(edges)
        if has_values(edges):
            self.length = max(numbers.diff().tolist(), default=0)
        place, token = (torch.arange(n, device=edges.device) for n in (self.length, T))
        self.index = (edges[:-1].unsqueeze(1) + place).clamp(max=max(T - 1, 0)).flatten()
        self.real = place < lengths.unsqueeze(1)
        sequence = (torch.searchsorted(edges, token, right=True) - 1).clamp(min=0, max=max(self.N - 1, 0))
        self.back = sequence * self.length + token - edges[sequence]

    def read(self, tensor: Tensor) -> Tensor:
        """[B, T, h, ...] -> [N * Hk, h / Hk, L, ...]; other tokens' values at padding."""
        if self.index is not None:
            tensor = tensor[0].index_select(0, self.index).unflatten(0, (self.N, self.length))
        rows = tensor.to(self.dtype).unflatten(2, (self.Hk, -1))
        return rows.movedim(1, 3).flatten(0, 1)

    def zero_at_padding(self, rows: Tensor) -> Tensor:
        """rows [N * Hk, R, L, ...]."""
        if self.index is None:
            return rows
        real = self.real.repeat_interleave(self.Hk, dim=0).unsqueeze(1)
        real = real.reshape(*real.shape, *(1 for _ in rows.shape[3:]))
        return torch.where(real, rows, torch.zeros_like(rows))

    def write(self, o: Tensor) -> Tensor:
        """[N * Hk, R, L, V] -> [B, T, H, V]."""
        o = o.unflatten(0, (self.N, self.Hk)).movedim(3, 1).flatten(2, 3)
        if self.index is None:
            return o
        return o.flatten(0, 1).index_select(0, self.back).unsqueeze(0)

    def state(self, given: Tensor | None, width: int) -> Tensor:
        """[N, H, D, width] -> [N * Hk, R, D, width]; zeros for None."""
        H, D = self.q.shape[2:]
        if given is None:
            return self.q.new_zeros(self.N * self.Hk, H // self.Hk, D, width, dtype=self.dtype)
        return given.to(self.dtype).reshape(self.N * self.Hk, H // self.Hk, D, width)
