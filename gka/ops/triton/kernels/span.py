"""What a span of tokens adds to the running sums, and its gradients, for bfloat16 keys and values.

The equations are those of `gka.distributed.sums`, with the weights w [B, T, H] of the tokens at the end of the
span, and r [B, T, Hk], by which each key is multiplied:

    S_kk = sum_t w_t r_t^2 k_t k_t^T        S_kv = sum_t w_t r_t k_t v_t^T

One operand of each product is a key or a value, exact in bfloat16, the other is a pair of bfloat16 numbers.

Legend: B rows, T tokens, H query heads, Hk key/value heads, R = H / Hk; D key dim, V value dim, BD and BV their
blocks; C tokens at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import span_config
from ..launch import launch, on_device, or_stand_in
from .arithmetic import dot, split, through_registers
from .common import load_matrix, load_rows, load_scalars, store_matrix, store_rows, store_scalars


@triton.jit
def _add_tokens(
    k_ptr, right_ptr, w_ptr, r_ptr, out_ptr, index, first, last, h, H, hk, Hk, D: tl.constexpr,
    width: tl.constexpr, POWER: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
    PIPELINE: tl.constexpr,
):  # fmt: skip
    """out[index] = sum over tokens first to last - 1 of w r^POWER k right^T."""
    S = tl.zeros([BD, BW], tl.float32)
    for start in tl.range(first, last, C, num_stages=PIPELINE):
        keys = load_rows(k_ptr, start, last, Hk, hk, D, 0, C, BD)
        right = load_rows(right_ptr, start, last, Hk, hk, width, 0, C, BW)
        r = load_scalars(r_ptr, start, last, Hk, hk, C)
        weight = load_scalars(w_ptr, start, last, H, h, C) * r
        if POWER == 2:  # both loads are the same one
            weight *= r
            keys = through_registers(keys)
        hi, lo = split(right.to(tl.float32) * weight[:, None], False)
        transposed = tl.trans(keys)
        S = dot(transposed, lo, dot(transposed, hi, S, False), False)
    store_matrix(out_ptr, S, index, D, width, 0, 0, BD, BW)


@triton.jit(do_not_specialize=["T", "pieces", "piece_tokens"])
def add_tokens(
    k_ptr, v_ptr, w_ptr, r_ptr,  # [B, T, Hk, D], [B, T, Hk, V], [B, T, H], [B, T, Hk]
    kk_ptr, kv_ptr,  # out: [pieces, B, H, D, D | V]
    T, pieces, piece_tokens, H, Hk, D: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, WITH_KK: tl.constexpr, PIPELINE: tl.constexpr,
):  # fmt: skip
    """Sums of pieces of piece_tokens tokens: a program for each piece, row, head and sum, those of S_kv first."""
    program = tl.program_id(0)
    programs = tl.num_programs(0) // (2 if WITH_KK else 1)
    index = program % programs
    h, row, piece = index % H, index // H % (programs // H // pieces), index // (programs // pieces)
    hk = h // (H // Hk)
    begin = row.to(tl.int64) * T
    first = begin + piece.to(tl.int64) * piece_tokens
    last = tl.minimum(first + piece_tokens, begin + T)
    if program < programs:
        _add_tokens(k_ptr, v_ptr, w_ptr, r_ptr, kv_ptr, index, first, last, h, H, hk, Hk, D, V, 1, C, BD, BV,
                    PIPELINE)  # fmt: skip
    else:
        _add_tokens(k_ptr, k_ptr, w_ptr, r_ptr, kk_ptr, index, first, last, h, H, hk, Hk, D, D, 2, C, BD, BD,
                    PIPELINE)  # fmt: skip


@triton.jit
def _times_pair(x, hi_ptr, lo_ptr, index, rows, columns, acc, BR: tl.constexpr, BC: tl.constexpr):
    """acc + x times matrix number `index` of a tensor [n, rows, columns] that is kept as a pair."""
    acc = dot(x, load_matrix(hi_ptr, index, rows, columns, 0, 0, BR, BC), acc, False)
    return dot(x, load_matrix(lo_ptr, index, rows, columns, 0, 0, BR, BC), acc, False)


@triton.jit
def _value_gradients(
    k_ptr, w_ptr, r_ptr, W_hi_ptr, W_lo_ptr, dv_ptr, row, start, last, hk, H, Hk, D: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dv = sum over heads of w r W^T k."""
    keys = load_rows(k_ptr, start, last, Hk, hk, D, 0, C, BD)
    r = load_scalars(r_ptr, start, last, Hk, hk, C)
    dv = tl.zeros([C, BV], tl.float32)
    for h in range(hk * (H // Hk), (hk + 1) * (H // Hk)):
        w = load_scalars(w_ptr, start, last, H, h, C)
        Wk = _times_pair(keys, W_hi_ptr, W_lo_ptr, row * H + h, D, V, tl.zeros([C, BV], tl.float32), BD, BV)
        dv += (w * r)[:, None] * Wk
    store_rows(dv_ptr, dv, start, last, Hk, hk, V, 0, C, BV)


@triton.jit
def _key_gradients(
    k_ptr, v_ptr, w_ptr, r_ptr, A_hi_ptr, A_lo_ptr, Wt_hi_ptr, Wt_lo_ptr, dk_ptr, dw_ptr,
    row, start, last, hk, H, Hk, D: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, WITH_KK: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """dk = sum over heads of w r (r A k + W v) - dr r^2 k / ||k||, and dw."""
    keys = load_rows(k_ptr, start, last, Hk, hk, D, 0, C, BD)
    values = load_rows(v_ptr, start, last, Hk, hk, V, 0, C, BV)
    r = load_scalars(r_ptr, start, last, Hk, hk, C)
    dk = tl.zeros([C, BD], tl.float32)
    dr = tl.zeros([C], tl.float32)
    for h in range(hk * (H // Hk), (hk + 1) * (H // Hk)):
        w = load_scalars(w_ptr, start, last, H, h, C)
        to_key = tl.zeros([C, BD], tl.float32)  # r A k + W v
        rkAk = tl.zeros([C], tl.float32)
        if WITH_KK:
            Ak = _times_pair(keys, A_hi_ptr, A_lo_ptr, row * H + h, D, D, to_key, BD, BD)
            to_key = Ak * r[:, None]
            rkAk = tl.sum(keys.to(tl.float32) * to_key, 1)
        to_key = _times_pair(values, Wt_hi_ptr, Wt_lo_ptr, row * H + h, V, D, to_key, BV, BD)
        both = tl.sum(keys.to(tl.float32) * to_key, 1)
        dk += (w * r)[:, None] * to_key
        dr += w * both
        store_scalars(dw_ptr, r * (both - 0.5 * rkAk), start, last, H, h, C)
    if NORMALIZE:
        norm = tl.where(r > 0.0, 1.0 / tl.where(r > 0.0, r, 1.0) - 1e-6, 0.0)
        slope = tl.where(norm > 0.0, -r * r / tl.where(norm > 0.0, norm, 1.0), 0.0)
        dk += (dr * slope)[:, None] * keys.to(tl.float32)
    store_rows(dk_ptr, dk, start, last, Hk, hk, D, 0, C, BD)


@triton.jit(do_not_specialize=["T", "pieces"])
def token_gradients(
    k_ptr, v_ptr, w_ptr, r_ptr,  # as in add_tokens
    A_hi_ptr, A_lo_ptr, W_hi_ptr, W_lo_ptr, Wt_hi_ptr, Wt_lo_ptr,  # [B, H, D, D], [B, H, D, V], [B, H, V, D]
    dk_ptr, dv_ptr, dw_ptr,  # out, as k, v and w
    T, pieces, H, Hk, D: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    WITH_KK: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Gradients of C tokens of a row and key/value head, from A = dS_kk + dS_kk^T and W = dS_kv: a program for
    those of the values, then one for those of the keys and of w.
    """
    program = tl.program_id(0)
    hk, place = program // 2 % Hk, program // 2 // Hk
    row = place // pieces
    start, last = row.to(tl.int64) * T + (place % pieces) * C, (row.to(tl.int64) + 1) * T
    if program % 2 == 0:
        _value_gradients(k_ptr, w_ptr, r_ptr, W_hi_ptr, W_lo_ptr, dv_ptr, row, start, last, hk, H, Hk, D, V, C, BD,
                         BV)  # fmt: skip
    else:
        _key_gradients(k_ptr, v_ptr, w_ptr, r_ptr, A_hi_ptr, A_lo_ptr, Wt_hi_ptr, Wt_lo_ptr, dk_ptr, dw_ptr, row,
                       start, last, hk, H, Hk, D, V, C, BD, BV, WITH_KK, NORMALIZE)  # fmt: skip


def launch_add_tokens(k: Tensor, v: Tensor, w: Tensor, r: Tensor, with_kk: bool) -> tuple[Tensor | None, Tensor]:
    """S_kk [B, H, D, D], None without `with_kk`, and S_kv [B, H, D, V] in float32, of contiguous inputs.

    Args:
        k, v: [B, T, Hk, D] and [B, T, Hk, V], bfloat16.
        w, r: weights [B, T, H] and factors of keys [B, T, Hk], float32.
    """
    (B, T, Hk, D), V, H = k.shape, v.shape[3], w.shape[2]
    config = span_config(D, V)
    piece = -(-max(config.piece, -(-T // config.pieces)) // config.tokens) * config.tokens
    pieces = -(-T // piece)
    kv = w.new_empty(pieces, B, H, D, V)
    kk = w.new_empty(pieces, B, H, D, D) if with_kk else None
    with on_device(k.device):
        launch(add_tokens, pieces * B * H * (2 if with_kk else 1),
            k_ptr=k, v_ptr=v, w_ptr=w, r_ptr=r, kk_ptr=or_stand_in(kk, kv), kv_ptr=kv,
            T=T, pieces=pieces, piece_tokens=piece, H=H, Hk=Hk, D=D, V=V, C=config.tokens,
            BD=config.BD, BV=config.BV, WITH_KK=with_kk, PIPELINE=config.pipeline,
            num_warps=config.warps, num_stages=1,
        )  # fmt: skip
    return None if kk is None else kk.sum(0), kv.sum(0)


def launch_token_gradients(
    k: Tensor, v: Tensor, w: Tensor, r: Tensor, A: Tensor | None, W: Tensor, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of k and v, in their dtype, and of w, with A = dS_kk + dS_kk^T [B, H, D, D] and W = dS_kv.

    Args:
        k, v, w, r: as in `launch_add_tokens`.
        A, W: float32; A is None without S_kk.
        normalize: whether r depends on k.
    """
    (B, T, Hk, D), V, H = k.shape, v.shape[3], w.shape[2]
    config = span_config(D, V)
    pieces = -(-T // config.rows)
    dk, dv, dw = torch.empty_like(k), torch.empty_like(v), torch.empty_like(w)
    W_hi, W_lo = _pair(W)
    Wt_hi, Wt_lo = (x.transpose(-1, -2).contiguous() for x in (W_hi, W_lo))
    A_hi, A_lo = (Wt_hi, Wt_lo) if A is None else _pair(A)
    with on_device(k.device):
        launch(token_gradients, 2 * pieces * B * Hk,
            k_ptr=k, v_ptr=v, w_ptr=w, r_ptr=r,
            A_hi_ptr=A_hi, A_lo_ptr=A_lo, W_hi_ptr=W_hi, W_lo_ptr=W_lo, Wt_hi_ptr=Wt_hi, Wt_lo_ptr=Wt_lo,
            dk_ptr=dk, dv_ptr=dv, dw_ptr=dw,
            T=T, pieces=pieces, H=H, Hk=Hk, D=D, V=V, C=config.rows, BD=config.BD, BV=config.BV,
            WITH_KK=A is not None, NORMALIZE=normalize, num_warps=config.warps, num_stages=1,
        )  # fmt: skip
    return dk, dv, dw


def _pair(x: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 tensors whose sum is x, to 16 bits of each number."""
    hi = x.bfloat16()
    return hi.contiguous(), (x - hi.float()).bfloat16().contiguous()
