"""One call of the chunk-wise op: its inputs, and how blocks of them are read, scanned and written.

Rows of tokens come as [chunks * Hk, R, C, ...] in the compute dtype, float64 for float64 inputs and float32
else; see `chunk_math` for what is done with them and `schedule` for their order.

Legend: B batch, T time, H query heads, Hk key/value heads, R = H / Hk, D key dim, V value dim, N sequences,
C tokens per chunk, b chunks of a block times Hk.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..types import Arguments, state_dtype
from .blocks import Block, Group, schedule
from .chunk_math import Chunks, Systems, unit_rows

# Elements of the tensors that a block holds at once; larger blocks only miss the caches.
BLOCK_ELEMENTS = {"cpu": 2**23}
BLOCK_ELEMENTS_DEFAULT = 2**27


def _has_fast_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster than those of float32: on a CPU only with AMX, not with AVX-512."""
    return device.type != "cpu" or getattr(torch.cpu, "_is_amx_tile_supported", bool)()


def default_chunk_size(device: torch.device) -> int:
    """Tokens per chunk that were fastest: larger chunks cost more products, smaller ones more scanning."""
    return 32 if device.type == "cpu" else 64


class ChunkedInputs:
    """The inputs of one call, flattened over the batch, and how to read and write blocks of them."""

    def __init__(self, arguments: Arguments) -> None:
        self.q, self.k, self.v, self.g = arguments.q, arguments.k, arguments.v, arguments.g
        self.alpha, self.beta, self.S_kk, self.S_kv = arguments[4:8]
        self.ridge_ratio, self.solver_steps = arguments.ridge_ratio, arguments.solver_steps
        self.plan = arguments.plan
        self.scale, self.normalize_qk = arguments.scale, arguments.normalize_qk
        self.chunk_size = arguments.chunk_size or default_chunk_size(self.q.device)
        batch, length, self.H, self.D = self.q.shape
        self.Hk, self.V = self.v.shape[2], self.v.shape[3]
        self.R = self.H // self.Hk
        self.tokens = batch * length
        self.dtype = state_dtype(self.q.dtype)
        refined_16_bit = self.q.dtype in (torch.bfloat16, torch.float16) and len(self.solver_steps) > 1
        fast = refined_16_bit and _has_fast_bfloat16(self.q.device)
        self.product_dtype = torch.bfloat16 if fast else self.dtype
        if arguments.cu_seqlens is None:
            self.bounds = [(n * length, (n + 1) * length) for n in range(batch)]
        else:
            self.bounds = list(pairwise(arguments.cu_seqlens.tolist()))

    @property
    def groups(self) -> list[Group]:
        C, D, V = self.chunk_size, self.D, self.V
        per_chunk = self.H * (3 * D * (D + V) + C * (8 * D + 4 * V + 5 * C))
        budget = BLOCK_ELEMENTS.get(self.q.device.type, BLOCK_ELEMENTS_DEFAULT)
        return list(schedule(self.bounds, C, max(1, budget // per_chunk)))

    def index(self, block: Block) -> Tensor:
        """Flat token numbers [chunks * C] of a block; `self.tokens` at padding."""
        return block.tokens(self.chunk_size, self.tokens, self.q.device).view(-1)

    def read(self, tensor: Tensor, index: Tensor) -> Tensor:
        """Rows of [B, T, h, ...] as [chunks * Hk, h / Hk, C, ...] in the compute dtype."""
        rows = tensor.reshape(self.tokens, self.Hk, -1, *tensor.shape[3:])
        rows = rows.index_select(0, index.clamp_max(self.tokens - 1)).to(self.dtype)
        rows = rows.unflatten(0, (-1, self.chunk_size)).movedim(1, 3)
        return rows.flatten(0, 1).contiguous()

    def real(self, index: Tensor) -> Tensor:
        """1 for the tokens of a block, 0 for padding, [chunks * Hk, 1, C, 1] in the compute dtype."""
        real = (index < self.tokens).view(-1, 1, 1, self.chunk_size, 1)
        return real.expand(-1, self.Hk, -1, -1, -1).flatten(0, 1).to(self.dtype)

    def zero_at_padding(self, Q: Tensor, index: Tensor) -> Tensor:
        """Q [chunks * Hk, R, C, D]; with a tolerance zero at padding, which must keep no chunk going."""
        return Q if self.plan.tolerance is None else Q * self.real(index)

    def write(self, target: Tensor, index: Tensor, rows: Tensor) -> None:
        """The inverse of `read`, into a target [B * T + 1, h, ...] whose last row takes the padding."""
        rows = rows.unflatten(0, (-1, self.Hk)).movedim(3, 1).flatten(0, 1)
        target.index_copy_(0, index, rows.reshape(-1, *target.shape[1:]).to(target.dtype))

    def target(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return like.new_empty(self.tokens + 1, *like.shape[2:], dtype=dtype or like.dtype)

    def finish(self, target: Tensor, like: Tensor) -> Tensor:
        return target[: self.tokens].view(like.shape[0], like.shape[1], *target.shape[1:])

    def first_state(self, given: Tensor | None, width: int, sequences: Tensor) -> Tensor:
        """[sequences, H, D, width], a fresh tensor in the compute dtype."""
        if given is None:
            return self.q.new_zeros(len(sequences), self.H, self.D, width, dtype=self.dtype)
        return given.index_select(0, sequences).to(self.dtype)

    def sequences(self, group: Group) -> Tensor:
        return torch.tensor(group.sequences, device=self.q.device, dtype=torch.long)

    def chunks(self, index: Tensor) -> tuple[Chunks, tuple[Tensor, Tensor] | None]:
        """A block's keys, values and masks; and, where keys are normalised, their norms and divisors."""
        keys, norms = self.read(self.k, index).squeeze(1), None
        if self.normalize_qk:
            keys, *norms_list = unit_rows(keys)
            norms = (norms_list[0], norms_list[1])
        values = self.read(self.v, index).squeeze(1)
        real = (index < self.tokens).view(-1, 1, 1, self.chunk_size)
        g = self.read(self.g, index).unflatten(0, (-1, self.Hk))
        weight = torch.ones_like(g) if self.beta is None else self._square_beta(index).view_as(g)
        zero = g.new_zeros(())
        g, weight = (torch.where(real, tensor, zero).flatten(0, 1) for tensor in (g, weight))
        return Chunks.build(keys, values, g, weight), norms

    def _square_beta(self, index: Tensor) -> Tensor:
        assert self.beta is not None
        return self.read(self.beta, index).square()

    def scan(self, block: Block, decay: Tensor, added: Tensor, carry: Tensor, *, reverse: bool) -> Tensor:
        """carry <- decay carry + added, wave by wave; returns what carry was before each chunk.

        decay [b, R]; added [b, R, D, .]; carry [sequences, H, D, .] is updated in place.
        """
        before = torch.empty_like(added)
        shape = (-1, self.H, *added.shape[2:])
        before_by_chunk, added_by_chunk = before.view(shape), added.view(shape)
        decay_by_chunk = decay.reshape(-1, self.H, 1, 1)
        for first, last in reversed(block.waves) if reverse else block.waves:
            active = carry[: last - first]
            before_by_chunk[first:last] = active
            active.mul_(decay_by_chunk[first:last]).add_(added_by_chunk[first:last])
        return before

    def states(self, block: Block, chunks: Chunks, carry: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """First states S_kk, S_kv of a block's chunks; `carry` moves to the block's end."""
        decay = chunks.zeta[..., -1]
        S_kv = self.scan(block, decay, chunks.increment(chunks.Vv), carry[1], reverse=False)
        if not self.solver_steps:
            return S_kv[..., :0], S_kv
        return self.scan(block, decay, chunks.increment(chunks.K), carry[0], reverse=False), S_kv

    def inputs(self, block: Block, carry: tuple[Tensor, Tensor]) -> tuple[Tensor, Chunks, Tensor, Tensor, Tensor]:
        """The next block forwards: index, chunks, the states before them, and Q, normalised if asked for."""
        index = self.index(block)
        chunks, _ = self.chunks(index)
        first_kk, first_kv = self.states(block, chunks, carry)
        Q = self.read(self.q, index)
        return index, chunks, first_kk, first_kv, unit_rows(Q)[0] if self.normalize_qk else Q

    def systems(self, chunks: Chunks, S_kk: Tensor) -> Systems:
        return Systems.build(chunks, S_kk, self.ridge_ratio, self.plan, self.product_dtype)

    def carries(self, group: Group) -> tuple[Tensor, Tensor]:
        numbers = self.sequences(group)
        if not self.solver_steps:
            return self.q.new_zeros(0), self.first_state(self.S_kv, self.V, numbers)
        S_kk = self.first_state(self.S_kk, self.D, numbers)
        return 0.5 * (S_kk + S_kk.transpose(-1, -2)), self.first_state(self.S_kv, self.V, numbers)

    def blend(self, Q: Tensor, X: Tensor, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """y = q + alpha (x - q) and alpha [b, R, C, 1]."""
        if self.alpha is None:
            return X, None
        alpha = self.read(self.alpha, index).unsqueeze(-1)
        return torch.lerp(Q, X, alpha), alpha
