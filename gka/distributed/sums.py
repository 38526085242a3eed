"""What a span of tokens adds to the running sums (paper, section 4.1), with its gradients.

    E_t  = g_{t+1} + ... + g_T              r_t = 1 / (||k_t||_2 + 1e-6) if keys are normalised, else 1
    w_t  = beta_t^2 e^{E_t}                 log_decay = g_1 + ... + g_T
    S_kk = sum_t w_t r_t^2 k_t k_t^T        S_kv = sum_t w_t r_t k_t v_t^T

A state S before the span becomes e^{log_decay} S + S_span after it. With A = dS_kk + dS_kk^T and W = dS_kv:

    dw_t = r_t^2 k_t^T A k_t / 2 + r_t k_t^T W v_t               dg_t = dlog_decay + sum_{u<t} w_u dw_u
    dk_t = w_t r_t (r_t A k_t + W v_t) - dr_t r_t^2 k_t / ||k_t||      dv_t = w_t r_t W^T k_t
    dr_t = w_t (r_t k_t^T A k_t + k_t^T W v_t)

Sums are float32, or float64 for float64 inputs. For bfloat16 and at most 128 dims kernels run on an NVIDIA GPU
(`gka.ops.triton.kernels.span`); `products` tells how 16-bit keys and values are multiplied elsewhere.

Legend: B rows, T tokens of the span, H query heads, Hk key/value heads, R = H / Hk, D key dim, V value dim,
C tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.autocast import autocast_off
from ..ops.transforms import must_dispatch
from ..ops.triton import fused
from ..ops.triton.config import MAX_DIM
from ..ops.types import State, state_dtype
from .collectives import refuse_second_derivatives
from .products import product

BLOCK_ELEMENTS = 2**24  # 64 MiB in float32
SUMMED_AT_ONCE = 256  # tokens
SIDE_BY_SIDE = 16  # parts of a block that are summed up at once, if it divides: one head keeps one processor busy


@dataclass(frozen=True)
class SpanSums:
    """What a span adds to the states, as it is sent to other ranks.

    flat: [..., B, H, F], the numbers of S_kk, then those of S_kv, then log_decay.
    D, V: key and value dims.
    with_kk: whether S_kk is among them.
    """

    flat: Tensor
    D: int
    V: int
    with_kk: bool

    @property
    def log_decay(self) -> Tensor:
        """[..., B, H]."""
        return self.flat[..., -1]

    @property
    def S_kk(self) -> Tensor | None:
        """[..., B, H, D, D]; None without a solve."""
        return self.states_of(self.flat).S_kk

    @property
    def S_kv(self) -> Tensor:
        """[..., B, H, D, V]."""
        return self.states_of(self.flat).S_kv

    def states_of(self, flat: Tensor) -> State:
        """The matrices of a tensor [..., F] or [..., F - 1] like `flat`."""
        n = self.D * self.D if self.with_kk else 0
        S_kk = flat[..., :n].unflatten(-1, (self.D, self.D)) if self.with_kk else None
        return State(S_kk, flat[..., n : n + self.D * self.V].unflatten(-1, (self.D, self.V)))

    def replaced(self, S_kk: Tensor | None, S_kv: Tensor) -> SpanSums:
        """The same with other matrices."""
        return replace(self, flat=flattened(S_kk, S_kv, self.log_decay))


def flattened(S_kk: Tensor | None, S_kv: Tensor, log_decay: Tensor) -> Tensor:
    """[..., F], from S_kk [..., D, D] or None, S_kv [..., D, V] and log_decay [...]."""
    states = [x.flatten(-2) for x in (S_kk, S_kv) if x is not None]
    return torch.cat([*states, log_decay.unsqueeze(-1)], -1)


def span_sums(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, *, normalize_k: bool, with_kk: bool
) -> SpanSums:
    """The sums of a span of tokens, from a zero state.

    Args:
        k [B, T, Hk, D], v [B, T, Hk, V]: keys and values, of one dtype; T may be 0.
        g, beta: log-decays of at most 0, write strengths or None, [B, T, H], any float dtype.
        normalize_k: whether to divide keys by (their Euclidean norm + 1e-6).
        with_kk: whether to compute S_kk.
    """
    narrow = k.dtype == torch.bfloat16 and max(k.shape[3], v.shape[3]) <= MAX_DIM[torch.bfloat16]
    if narrow and k.numel() > 0 and fused.enabled(k) and not must_dispatch(k):
        inputs = [None if x is None else x.contiguous() for x in (k, v, g, beta)]
        flat = _SumsByKernels.apply(*inputs, normalize_k, with_kk)
    else:
        flat = _SpanSums.apply(k, v, g, beta, normalize_k, with_kk)
    return SpanSums(flat, k.shape[3], v.shape[3], with_kk)


def sums_after(x: Tensor, dim: int) -> Tensor:
    """x_{t+1} + ... + x_T for every t, over finite x. Nothing is subtracted, so long sums cost no digits.

    Products with triangles of ones in float64, for torch.cumsum is not deterministic on GPUs.
    """
    return _sums_beside(x, dim, later=True)


def sums_before(x: Tensor, dim: int) -> Tensor:
    """x_1 + ... + x_{t-1} for every t; see `sums_after`."""
    return _sums_beside(x, dim, later=False)


def _sums_beside(x: Tensor, dim: int, later: bool) -> Tensor:
    T = x.shape[dim]
    if T <= SUMMED_AT_ONCE:
        return (x.movedim(dim, -1).double() @ _triangle(T, later, x.device)).movedim(-1, dim).to(x.dtype)
    rows = F.pad(x.movedim(dim, -1).double(), (0, -T % SUMMED_AT_ONCE)).unflatten(-1, (-1, SUMMED_AT_ONCE))
    inside = rows @ _triangle(SUMMED_AT_ONCE, later, x.device)
    whole = _sums_beside(rows.sum(-1), -1, later)
    return (inside + whole.unsqueeze(-1)).flatten(-2)[..., :T].movedim(-1, dim).to(x.dtype)


def _triangle(n: int, later: bool, device: torch.device) -> Tensor:
    """[n, n], 1 where the row is later (or earlier) than the column, else 0."""
    ones = torch.ones(n, n, device=device, dtype=torch.float64)
    return ones.tril(-1) if later else ones.triu(1)


def finite(g: Tensor) -> Tensor:
    """Log-decays of at least -1e4, whose exponential is 0 like that of -inf."""
    return g.clamp(min=-1e4)


class _SumsByKernels(torch.autograd.Function):
    """The flat sums by `gka.ops.triton.kernels.span`, of contiguous inputs."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, normalize_k: bool, with_kk: bool
    ) -> Tensor:
        from ..ops.triton.kernels.span import launch_span_sums

        sums, to_end, w = launch_span_sums(k, v, g, beta, normalize=normalize_k, with_kk=with_kk)
        ctx.save_for_backward(k, v, g, beta, to_end, w)
        ctx.settings = {"normalize": normalize_k, "with_kk": with_kk}
        return sums

    @staticmethod
    def backward(ctx: Any, d_sums: Tensor) -> tuple[Tensor | None, ...]:
        from ..ops.triton.kernels.span import launch_span_gradients

        refuse_second_derivatives()
        return *launch_span_gradients(d_sums.contiguous(), *ctx.saved_tensors, **ctx.settings), None, None


class _SpanSums(torch.autograd.Function):
    """The flat sums in PyTorch. It keeps its inputs alone: the backward pass computes the rest again."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, normalize_k: bool, with_kk: bool
    ) -> Tensor:
        ctx.save_for_backward(k, v, g, beta)
        ctx.settings = normalize_k, with_kk
        with autocast_off(k.device):
            span = _Span(k, v, g, beta, normalize_k)
            return flattened(*span.sums(with_kk), g.to(span.wide).sum(1))

    @staticmethod
    def backward(ctx: Any, d_sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None]:
        refuse_second_derivatives()
        (k, v, g, beta), (normalize_k, with_kk) = ctx.saved_tensors, ctx.settings
        with autocast_off(k.device):
            span = _Span(k, v, g, beta, normalize_k)
            given = SpanSums(d_sums, span.D, span.V, with_kk)
            dS_kk, dS_kv = given.states_of(d_sums)
            dk, dv, dw = span.gradients(None if dS_kk is None else dS_kk + dS_kk.mT, dS_kv)
            dbeta = None if beta is None else (2.0 * dw * span.to_end * beta.to(span.wide)).to(beta.dtype)
            dg = (given.log_decay.unsqueeze(1) + sums_before(dw * span.w, 1)).to(g.dtype)
        return dk, dv, dg, dbeta, None, None


class _Span:
    """The tokens of a span and their weights, read in blocks of C tokens; n = B Hk.

    to_end = e^E and w [B, T, H]; r and norm = ||k|| [B, T, Hk, 1], norm None if keys are not normalised.
    """

    def __init__(self, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, normalize_k: bool) -> None:
        self.k, self.v, self.wide = k, v, state_dtype(k.dtype)
        (self.B, self.T, self.Hk, self.D), self.V, self.H = k.shape, v.shape[3], g.shape[2]
        self.R = self.H // self.Hk
        self.in_parts = k.dtype.itemsize == 2 and k.device.type == "cuda"
        self.to_end = sums_after(finite(g.to(self.wide)), 1).exp()
        self.w = self.to_end if beta is None else self.to_end * beta.to(self.wide).square()
        self.norm: Tensor | None = None
        self.r = self.w.new_ones(self.B, self.T, self.Hk, 1)
        if normalize_k:
            self.norm = torch.linalg.vector_norm(k, dim=3, keepdim=True, dtype=self.wide)
            self.r = 1.0 / (self.norm + 1e-6)

    def sums(self, with_kk: bool) -> tuple[Tensor | None, Tensor]:
        """S_kk [B, H, D, D], None without `with_kk`, and S_kv [B, H, D, V]."""
        S_kk, S_kv = self.zeros(self.D if with_kk else 0), self.zeros(self.V)
        for tokens in self.blocks():
            K, V, w, r = self.block(tokens, side_by_side=gcd(tokens.stop - tokens.start, SIDE_BY_SIDE))
            w_kv = w * r
            S_kv += self.summed_product(weighted_keys(K, w_kv), V)
            if with_kk:
                S_kk += self.summed_product(weighted_keys(K, w_kv * r), K)
        return self.by_head(S_kk) if with_kk else None, self.by_head(S_kv)

    def gradients(self, A: Tensor | None, dS_kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dk, dv and dw; A = dS_kk + dS_kk^T [B, H, D, D], None without S_kk."""
        W, W_t = self.by_key_head(dS_kv), self.by_key_head(dS_kv.mT)
        W_and_A = W if A is None else torch.cat([W, self.by_key_head(A)], 2)
        dk, dv, dw = torch.empty_like(self.k), torch.empty_like(self.v), torch.empty_like(self.w)
        for tokens in self.blocks():
            found = self.block_gradients(tokens, W_and_A, W_t)
            for whole, rows in zip((dk, dv, dw), found, strict=True):
                whole[:, tokens] = self.by_token(rows).reshape(whole[:, tokens].shape)
        return dk, dv, dw

    def blocks(self) -> Iterator[slice]:
        """Tokens whose weighted keys and values have at most BLOCK_ELEMENTS elements."""
        length = max(1, BLOCK_ELEMENTS // max(1, self.B * self.H * max(self.D, self.V)))
        if not self.B:
            return iter(())
        return (slice(first, min(first + length, self.T)) for first in range(0, self.T, length))

    def rows(self, x: Tensor, tokens: slice, side_by_side: int = 1) -> Tensor:
        """[B, T, Hk, .] -> [n, C, .], or [n side_by_side, C / side_by_side, .]."""
        return x[:, tokens].unflatten(1, (side_by_side, -1)).permute(0, 3, 1, 2, 4).flatten(0, 2)

    def block(self, tokens: slice, side_by_side: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """K [n, C, D], V [n, C, V], w [n, C, R] and r [n, C, 1]."""
        w = self.w.unflatten(2, (self.Hk, self.R))
        K, V, w, r = (self.rows(x, tokens, side_by_side) for x in (self.k, self.v, w, self.r))
        return K, V, w, r

    def summed_product(self, weighted: Tensor, right: Tensor) -> Tensor:
        """The sum over a block's tokens, [n, R * D, .], from parts of it side by side."""
        return self.product(weighted.mT, right).unflatten(0, (self.B * self.Hk, -1)).sum(1)

    def block_gradients(self, tokens: slice, W_and_A: Tensor, W_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dk [n, C, D], dv [n, C, V] and dw [n, C, R].

        W_and_A: W and A, [n, D, R * V + R * D], or W alone; W_t: W^T [n, V, R * D].
        """
        K, V, w, r = self.block(tokens)
        keys, w_kv = K.unsqueeze(2), (w * r).unsqueeze(3)
        kW, Ak = self.product(K, W_and_A).split([self.R * self.V, W_and_A.shape[2] - self.R * self.V], 2)
        dv = self._over_query_heads(kW.unflatten(2, (self.R, -1)) * w_kv)
        to_key = self.product(V, W_t).unflatten(2, (self.R, -1))  # W v + r A k
        half_kAk = torch.zeros_like(w)
        if Ak.shape[2]:
            Ak = Ak.unflatten(2, (self.R, -1))
            half_kAk = 0.5 * (keys * Ak).sum(3)
            to_key = to_key.addcmul_(Ak, r.unsqueeze(3))
        k_to_key = (keys * to_key).sum(3)
        dk = self._over_query_heads(to_key.mul_(w_kv))
        if self.norm is not None:
            dr = (w * k_to_key).sum(2, keepdim=True)
            norm = self.rows(self.norm, tokens)
            slope = torch.where(norm > 0, -r.square() / norm, torch.zeros_like(norm))
            dk = torch.addcmul(dk, K.to(self.wide), dr * slope)
        return dk, dv, r * (k_to_key - r * half_kAk)

    def _over_query_heads(self, x: Tensor) -> Tensor:
        """[n, C, R, .] -> [n, C, .]."""
        return x.squeeze(2) if self.R == 1 else x.sum(2)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return product(a, b, self.wide, self.in_parts)

    def zeros(self, width: int) -> Tensor:
        return self.w.new_zeros(self.B * self.Hk, self.R * self.D, width)

    def by_head(self, S: Tensor) -> Tensor:
        """[n, R * D, .] -> [B, H, D, .]."""
        return S.view(self.B, self.H, self.D, S.shape[2])

    def by_key_head(self, S: Tensor) -> Tensor:
        """[B, H, i, j] -> [n, i, R * j]."""
        return S.unflatten(1, (self.Hk, self.R)).transpose(2, 3).flatten(3).flatten(0, 1)

    def by_token(self, rows: Tensor) -> Tensor:
        """[n, C, .] -> [B, C, Hk, .]."""
        return rows.unflatten(0, (self.B, self.Hk)).transpose(1, 2)


def weighted_keys(K: Tensor, w: Tensor) -> Tensor:
    """K [n, C, D] times w [n, C, R] -> [n, C, R * D]."""
    return (K.unsqueeze(2) * w.unsqueeze(3)).flatten(2)
