"""What a span of tokens adds to the running sums (paper, section 4.1), with its gradients.

    E_t  = g_{t+1} + ... + g_T              r_t = 1 / (||k_t||_2 + 1e-6) if keys are normalised, else 1
    w_t  = beta_t^2 e^{E_t}                 log_decay = g_1 + ... + g_T
    S_kk = sum_t w_t r_t^2 k_t k_t^T        S_kv = sum_t w_t r_t k_t v_t^T

A state S before the span becomes e^{log_decay} S + S_span after it. With A = dS_kk + dS_kk^T and W = dS_kv:

    dw_t = r_t^2 k_t^T A k_t / 2 + r_t k_t^T W v_t               dg_t = dlog_decay + sum_{u<t} w_u dw_u
    dk_t = w_t r_t (r_t A k_t + W v_t) - dr_t r_t^2 k_t / ||k_t||      dv_t = w_t r_t W^T k_t
    dr_t = w_t (r_t k_t^T A k_t + k_t^T W v_t)

Sums are float32, or float64 for float64 inputs. For 16-bit keys and values on a GPU, each operand of a product is
one or two bfloat16 tensors, 16 bits of each number, and the sums are float32; the setting of TF32 has no effect.
For bfloat16 and at most 128 dims on an NVIDIA GPU kernels do it (`gka.ops.triton.kernels.span`), else PyTorch.
For 32-bit inputs `torch.set_float32_matmul_precision` counts, as for the op in PyTorch.

Legend: B rows, T tokens of the span, H query heads, Hk key/value heads, R = H / Hk, D key dim, V value dim,
C tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.autocast import autocast_off
from ..ops.triton import fused
from ..ops.triton.config import MAX_DIM
from ..ops.types import state_dtype

BLOCK_ELEMENTS = 2**24  # 64 MiB in float32
SUM_BLOCK = 256


class SpanSums(NamedTuple):
    """log_decay [B, H], S_kk [B, H, D, D] (None without a solve) and S_kv [B, H, D, V] of a span."""

    log_decay: Tensor
    S_kk: Tensor | None
    S_kv: Tensor


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
    log_decay, S_kk, S_kv = _SpanSums.apply(k, v, g, beta, normalize_k, with_kk)
    return SpanSums(log_decay, S_kk if with_kk else None, S_kv)


def sums_after_tokens(x: Tensor) -> Tensor:
    """x_{t+1} + ... + x_T for every t of x [B, T, H]. Nothing is subtracted, so -inf and long sums are harmless.

    In blocks of tokens: over dim 1 PyTorch's cumsum on a GPU has one thread for each row and head.
    """
    B, T, H = x.shape
    blocks = F.pad(x.transpose(1, 2), (0, -T % SUM_BLOCK)).reshape(B, H, -1, SUM_BLOCK)
    later = sums_after(blocks.sum(3))
    found = sums_after(blocks) + later.unsqueeze(3)
    return found.flatten(2)[:, :, :T].transpose(1, 2).contiguous()


def sums_after(x: Tensor) -> Tensor:
    """x_{t+1} + ... + x_T for every t of the last dim."""
    return F.pad(x[..., 1:], (0, min(1, x.shape[-1]))).flip(-1).cumsum(-1).flip(-1)


def product(a: Tensor, b: Tensor, wide: torch.dtype, in_parts: bool) -> Tensor:
    """a b, [n, i, j] times [n, j, k] -> [n, i, k] in the dtype `wide`.

    in_parts: multiply bfloat16 parts, but not the lower part of a with that of b.
    """
    if not in_parts:
        return torch.bmm(a.to(wide), b.to(wide))
    (a_high, *a_low), (b_high, *b_low) = bfloat16_parts(a), bfloat16_parts(b)
    total = _float32_bmm(a_high, b_high)
    for low in a_low:
        total += _float32_bmm(low, b_high)
    for low in b_low:
        total += _float32_bmm(a_high, low)
    return total


def bfloat16_parts(x: Tensor) -> list[Tensor]:
    """bfloat16 tensors whose sum is x, exactly for 16 bits, to 16 bits of each number for float32."""
    if x.dtype == torch.bfloat16:
        return [x]
    high = x.bfloat16()
    return [high, (x.float() - high.float()).bfloat16()]


def _float32_bmm(a: Tensor, b: Tensor) -> Tensor:
    if a.device.type == "cuda":
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


class _SpanSums(torch.autograd.Function):
    """Keeps its inputs alone: the backward pass computes the rest again."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, normalize_k: bool, with_kk: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(k, v, g, beta)
        ctx.settings = normalize_k, with_kk
        with autocast_off(k.device):
            span = _Span(k, v, g, beta, normalize_k)
            S_kk, S_kv = span.sums(with_kk)
            return g.to(span.wide).sum(1), S_kv.new_empty(0) if S_kk is None else S_kk, S_kv

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_log_decay: Tensor, dS_kk: Tensor, dS_kv: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None]:
        (k, v, g, beta), (normalize_k, with_kk) = ctx.saved_tensors, ctx.settings
        with autocast_off(k.device):
            span = _Span(k, v, g, beta, normalize_k)
            A = dS_kk + dS_kk.transpose(-1, -2) if with_kk else None
            dk, dv, dw = span.gradients(A, dS_kv)
            dbeta = None if beta is None else (2.0 * dw * span.to_end * beta.to(span.wide)).to(beta.dtype)
            from_earlier = sums_after_tokens((dw * span.w).flip(1)).flip(1)
            dg = (d_log_decay.unsqueeze(1) + from_earlier).to(g.dtype)
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
        narrow = k.dtype == torch.bfloat16 and max(self.D, self.V) <= MAX_DIM[torch.bfloat16]
        self.by_kernels = narrow and k.numel() > 0 and fused.enabled(k)
        self.to_end = sums_after_tokens(g.to(self.wide)).exp()
        self.w = self.to_end if beta is None else self.to_end * beta.to(self.wide).square()
        self.norm: Tensor | None = None
        self.r = self.w.new_ones(self.B, self.T, self.Hk, 1)
        if normalize_k:
            self.norm = torch.linalg.vector_norm(k, dim=3, keepdim=True, dtype=self.wide)
            self.r = 1.0 / (self.norm + 1e-6)

    def sums(self, with_kk: bool) -> tuple[Tensor | None, Tensor]:
        """S_kk, None without `with_kk`, and S_kv."""
        if self.by_kernels:
            from ..ops.triton.kernels.span import launch_add_tokens

            return launch_add_tokens(*self.for_kernels, with_kk)
        S_kk, S_kv = self.zeros(self.D if with_kk else 0), self.zeros(self.V)
        for tokens in self.blocks():
            K, V, w, r = self.block(tokens)
            w_kv = w * r
            S_kv += self.product(weighted_keys(K, w_kv), V)
            if with_kk:
                S_kk += self.product(weighted_keys(K, w_kv * r), K)
        return self.by_head(S_kk) if with_kk else None, self.by_head(S_kv)

    def gradients(self, A: Tensor | None, dS_kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dk, dv and dw; A = dS_kk + dS_kk^T [B, H, D, D], None without S_kk."""
        if self.by_kernels:
            from ..ops.triton.kernels.span import launch_token_gradients

            return launch_token_gradients(*self.for_kernels, A, dS_kv, normalize=self.norm is not None)
        A = None if A is None else self.by_key_head(A)
        W, W_t = self.by_key_head(dS_kv), self.by_key_head(dS_kv.transpose(-1, -2))
        dk, dv, dw = torch.empty_like(self.k), torch.empty_like(self.v), torch.empty_like(self.w)
        for tokens in self.blocks():
            found = self.block_gradients(tokens, A, W, W_t)
            for whole, rows in zip((dk, dv, dw), found, strict=True):
                whole[:, tokens] = self.by_token(rows).reshape(whole[:, tokens].shape)
        return dk, dv, dw

    @property
    def for_kernels(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k, v, w and r, contiguous."""
        return self.k.contiguous(), self.v.contiguous(), self.w.contiguous(), self.r.squeeze(3).contiguous()

    def blocks(self) -> Iterator[slice]:
        """Tokens whose weighted keys and values have at most BLOCK_ELEMENTS elements."""
        length = max(1, BLOCK_ELEMENTS // (self.B * self.H * max(self.D, self.V)))
        return (slice(first, min(first + length, self.T)) for first in range(0, self.T, length))

    def rows(self, x: Tensor, tokens: slice) -> Tensor:
        """[B, T, Hk, .] -> [n, C, .]."""
        return x[:, tokens].transpose(1, 2).flatten(0, 1)

    def block(self, tokens: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """K [n, C, D], V [n, C, V], w [n, C, R] and r [n, C, 1]."""
        w = self.w.unflatten(2, (self.Hk, self.R))
        K, V, w, r = (self.rows(x, tokens) for x in (self.k, self.v, w, self.r))
        return K, V, w, r

    def block_gradients(self, tokens: slice, A: Tensor | None, W: Tensor, W_t: Tensor) -> tuple[Tensor, ...]:
        """dk [n, C, D], dv [n, C, V] and dw [n, C, R]; A, W and W_t are [n, D or V, R * D or V]."""
        K, V, w, r = self.block(tokens)
        keys, w_kv = K.to(self.wide).unsqueeze(2), (w * r).unsqueeze(3)
        Wv = self.product(V, W_t).unflatten(2, (self.R, -1))
        kWv = (keys * Wv).sum(3)
        kAk = torch.zeros_like(kWv)
        if A is not None:
            Ak = self.product(K, A).unflatten(2, (self.R, -1))
            kAk = 0.5 * (keys * Ak).sum(3)
            Wv = Wv.addcmul_(Ak, r.unsqueeze(3))
        dk = (Wv * w_kv).sum(2)
        if self.norm is not None:
            dr = (w * (2.0 * r * kAk + kWv)).sum(2, keepdim=True)
            norm = self.rows(self.norm, tokens)
            slope = torch.where(norm > 0, -r.square() / norm, torch.zeros_like(norm))
            dk = dk + (dr * slope) * keys.squeeze(2)
        dv = (self.product(K, W).unflatten(2, (self.R, -1)) * w_kv).sum(2)
        return dk, dv, r * (r * kAk + kWv)

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
    """K [n, C, D] times w [n, C, R], transposed: [n, R * D, C]."""
    return (K.to(w.dtype).unsqueeze(2) * w.unsqueeze(3)).flatten(2).transpose(1, 2)
