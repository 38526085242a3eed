"""What a span of tokens adds to the running sums, and its gradients, for bfloat16 keys and values.

The equations are those of `gka.distributed.sums`. Kernels in their order:

    sum_blocks         g, backward w dw, summed over blocks of tokens
    weigh_tokens       E_t, w_t and the sum of g
    add_tokens         S_kk and S_kv
    state_pairs        backward: A = dS_kk + dS_kk^T and W = dS_kv, as pairs of bfloat16
    token_gradients    dk, dv and dw
    gate_gradients     dg and dbeta

The sums of a head are one row [S_kk | S_kv | sum of g] of F = D^2 + D V + 1 numbers, as they are sent to other
ranks, or [S_kv | sum of g]. One operand of each product is a key or a value, exact in bfloat16, the other is a
pair of bfloat16 numbers.

Legend: B rows, T tokens, H query heads, Hk key/value heads, R = H / Hk; D key dim, V value dim, BD and BV their
blocks; C tokens at a time; w [B, T, H] weights of the tokens at the end of the span, r [B, T, Hk] what a key is
multiplied by.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import span_config
from ..launch import launch, on_device
from .arithmetic import cast, dot, split, through_registers
from .common import load_matrix, load_rows, load_scalars, store_rows, store_scalars

G_LEAST = tl.constexpr(-1e4)  # e^g is 0; a finite number, so that no sum is infinity minus infinity


@triton.jit
def _block_of(blocks, T, H, C: tl.constexpr):
    """Of a program of a row, head and block of tokens: number of row and head, h; first token of the row, the one
    past its last, first of the block.
    """
    program = tl.program_id(0)
    row_and_head = program // blocks
    begin = (row_and_head // H).to(tl.int64) * T
    return row_and_head, row_and_head % H, begin, begin + T, begin + (program % blocks).to(tl.int64) * C


@triton.jit(do_not_specialize=["T", "blocks"])
def sum_blocks(
    x_ptr, y_ptr, totals_ptr,  # [B, T, H] each; out: [2, B, H, blocks] float64
    T, blocks, H, PRODUCT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sums over blocks of C tokens: of x y if PRODUCT, else of x >= G_LEAST and of x, in this order."""
    _, h, _, end, start = _block_of(blocks, T, H, C)
    x = load_scalars(x_ptr, start, end, H, h, C)
    place = totals_ptr + tl.program_id(0)
    if PRODUCT:
        x *= load_scalars(y_ptr, start, end, H, h, C)
        tl.store(place, tl.sum(x, 0).to(tl.float64))
    else:
        tl.store(place, tl.sum(tl.maximum(x, G_LEAST), 0).to(tl.float64))
        tl.store(place + tl.num_programs(0), tl.sum(x, 0).to(tl.float64))


@triton.jit
def _sum_of_blocks(totals_ptr, row_and_head, first, last, blocks, N: tl.constexpr):
    """The sum over the blocks first to last - 1 of a row and head, float64."""
    total = tl.full([], 0.0, tl.float64)
    for start in range(first, last, N):
        block = start + tl.arange(0, N)
        total += tl.sum(tl.load(totals_ptr + row_and_head * blocks + block, mask=block < last, other=0.0), 0)
    return total


@triton.jit(do_not_specialize=["T", "blocks"])
def weigh_tokens(
    g_ptr, beta_ptr, totals_ptr,  # [B, T, H], and of sum_blocks
    to_end_ptr, w_ptr, sums_ptr,  # out: e^E and w [B, T, H], and the last of F numbers, [B, H, F]
    T, blocks, H, F, HAS_BETA: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program for each row, head and block of C tokens."""
    row_and_head, h, _, end, start = _block_of(blocks, T, H, C)
    own = tl.program_id(0) % blocks
    after = _sum_of_blocks(totals_ptr, row_and_head, own + 1, blocks, blocks, N)
    # The token behind each, of this block; the first of the next is among `after`.
    place = start + 1 + tl.arange(0, C)
    inside = (place < end) & (tl.arange(0, C) < C - 1)
    later = tl.load(g_ptr + place * H + h, mask=inside, other=0.0).to(tl.float32)
    to_end = tl.exp(tl.cumsum(tl.maximum(later, G_LEAST), 0, reverse=True) + after.to(tl.float32))
    store_scalars(to_end_ptr, to_end, start, end, H, h, C)
    if HAS_BETA:
        beta = load_scalars(beta_ptr, start, end, H, h, C)
        store_scalars(w_ptr, to_end * beta * beta, start, end, H, h, C)
    if own == 0:
        unbounded_ptr = totals_ptr + tl.num_programs(0)
        total = _sum_of_blocks(unbounded_ptr, row_and_head, 0, blocks, blocks, N)
        tl.store(sums_ptr + row_and_head.to(tl.int64) * F + F - 1, total.to(tl.float32))


@triton.jit
def _key_scale(keys, NORMALIZE: tl.constexpr):
    """||k|| and r of keys [C, BD]; 0 and 1 if they are not normalised."""
    norm = tl.zeros([keys.shape[0]], tl.float32)
    if NORMALIZE:
        wide = keys.to(tl.float32)
        norm = tl.sqrt(tl.sum(wide * wide, 1))
        return norm, 1.0 / (norm + 1e-6)
    else:
        return norm, norm + 1.0


@triton.jit
def _add_tokens(
    k_ptr, right_ptr, w_ptr, out_ptr, first, last, h, H, hk, Hk, D: tl.constexpr, width: tl.constexpr,
    POWER: tl.constexpr, NORMALIZE: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
    PIPELINE: tl.constexpr,
):  # fmt: skip
    """out = sum over tokens first to last - 1 of w r^POWER k right^T."""
    S = tl.zeros([BD, BW], tl.float32)
    for start in tl.range(first, last, C, num_stages=PIPELINE):
        keys = load_rows(k_ptr, start, last, Hk, hk, D, 0, C, BD)
        right = load_rows(right_ptr, start, last, Hk, hk, width, 0, C, BW)
        weight = load_scalars(w_ptr, start, last, H, h, C)
        if NORMALIZE or POWER == 2:  # for POWER 2 both loads are the same one
            keys = through_registers(keys)
        _, r = _key_scale(keys, NORMALIZE)
        weight *= r * r if POWER == 2 else r
        hi, lo = split(right.to(tl.float32) * weight[:, None], False)
        transposed = tl.trans(keys)
        S = dot(transposed, lo, dot(transposed, hi, S, False), False)
    i, j = tl.arange(0, BD)[:, None], tl.arange(0, BW)[None, :]
    tl.store(out_ptr + i * width + j, S, mask=(i < D) & (j < width))


@triton.jit(do_not_specialize=["T", "pieces", "piece_tokens"])
def add_tokens(
    k_ptr, v_ptr, w_ptr,  # [B, T, Hk, D], [B, T, Hk, V], [B, T, H]
    sums_ptr,  # out: [pieces, B, H, F], but for the last of F in the first piece
    T, pieces, piece_tokens, H, Hk, D: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, WITH_KK: tl.constexpr, NORMALIZE: tl.constexpr, PIPELINE: tl.constexpr,
):  # fmt: skip
    """Sums of pieces of piece_tokens tokens: a program for each piece, row, head and sum, those of S_kv first."""
    KK: tl.constexpr = D * D if WITH_KK else 0
    program = tl.program_id(0)
    programs = tl.num_programs(0) // (2 if WITH_KK else 1)
    index = program % programs
    h, row, piece = index % H, index // H % (programs // H // pieces), index // (programs // pieces)
    hk = h // (H // Hk)
    begin = row.to(tl.int64) * T
    first = begin + piece.to(tl.int64) * piece_tokens
    last = tl.minimum(first + piece_tokens, begin + T)
    out_ptr = sums_ptr + index.to(tl.int64) * (KK + D * V + 1)
    if program < programs:
        _add_tokens(k_ptr, v_ptr, w_ptr, out_ptr + KK, first, last, h, H, hk, Hk, D, V, 1, NORMALIZE, C, BD, BV,
                    PIPELINE)  # fmt: skip
        if piece > 0:
            tl.store(out_ptr + KK + D * V, 0.0)
    else:
        _add_tokens(k_ptr, k_ptr, w_ptr, out_ptr, first, last, h, H, hk, Hk, D, D, 2, NORMALIZE, C, BD, BD,
                    PIPELINE)  # fmt: skip


@triton.jit
def _tile(ptr, rows, columns, row, column, N: tl.constexpr):
    """Addresses [N, N] from (row, column) of a matrix [rows, columns] and from (column, row) of its transpose, and
    which there are.
    """
    i, j = row + tl.arange(0, N)[:, None], column + tl.arange(0, N)[None, :]
    return ptr + i * columns + j, ptr + j * rows + i, (i < rows) & (j < columns)


@triton.jit
def _store_pair(hi_ptrs, lo_ptrs, x, inside):
    hi = cast(x, tl.bfloat16)
    tl.store(hi_ptrs, hi, mask=inside)
    tl.store(lo_ptrs, cast(x - hi.to(tl.float32), tl.bfloat16), mask=inside)


@triton.jit
def state_pairs(
    d_sums_ptr,  # [B, H, F], gradients
    A_hi_ptr, A_lo_ptr, W_hi_ptr, W_lo_ptr, Wt_hi_ptr, Wt_lo_ptr,  # out: [B, H, D, D], [B, H, D, V], [B, H, V, D]
    D: tl.constexpr, V: tl.constexpr, N: tl.constexpr, WITH_KK: tl.constexpr,
):  # fmt: skip
    """A, W and its transpose: a program for each row, head and tile of N x N, those of A first."""
    KK: tl.constexpr = D * D if WITH_KK else 0
    across: tl.constexpr = (D + N - 1) // N
    of_A: tl.constexpr = across * across if WITH_KK else 0
    tiles: tl.constexpr = of_A + across * ((V + N - 1) // N)
    index, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    d_ptr = d_sums_ptr + index * (KK + D * V + 1)
    if tile < of_A:
        row, column = tile // across * N, tile % across * N
        place, mirrored, inside = _tile(d_ptr, D, D, row, column, N)
        A = tl.load(place, mask=inside, other=0.0) + tl.load(mirrored, mask=inside, other=0.0)
        hi, _, _ = _tile(A_hi_ptr + index * (D * D), D, D, row, column, N)
        lo, _, _ = _tile(A_lo_ptr + index * (D * D), D, D, row, column, N)
        _store_pair(hi, lo, A, inside)
    else:
        row, column = (tile - of_A) % across * N, (tile - of_A) // across * N
        place, _, inside = _tile(d_ptr + KK, D, V, row, column, N)
        W = tl.load(place, mask=inside, other=0.0)
        hi, _, _ = _tile(W_hi_ptr + index * (D * V), D, V, row, column, N)
        lo, _, _ = _tile(W_lo_ptr + index * (D * V), D, V, row, column, N)
        _store_pair(hi, lo, W, inside)
        _, hi, _ = _tile(Wt_hi_ptr + index * (D * V), D, V, row, column, N)
        _, lo, _ = _tile(Wt_lo_ptr + index * (D * V), D, V, row, column, N)
        _store_pair(hi, lo, W, inside)


@triton.jit
def _times_pair(x, hi_ptr, lo_ptr, index, rows, columns, acc, BR: tl.constexpr, BC: tl.constexpr):
    """acc + x times matrix number `index` of a tensor [n, rows, columns] that is kept as a pair."""
    acc = dot(x, load_matrix(hi_ptr, index, rows, columns, 0, 0, BR, BC), acc, False)
    return dot(x, load_matrix(lo_ptr, index, rows, columns, 0, 0, BR, BC), acc, False)


@triton.jit
def _value_gradients(
    k_ptr, w_ptr, W_hi_ptr, W_lo_ptr, dv_ptr, row, start, last, hk, H, Hk, D: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """dv = sum over heads of w r W^T k."""
    keys = load_rows(k_ptr, start, last, Hk, hk, D, 0, C, BD)
    _, r = _key_scale(keys, NORMALIZE)
    dv = tl.zeros([C, BV], tl.float32)
    for h in range(hk * (H // Hk), (hk + 1) * (H // Hk)):
        w = load_scalars(w_ptr, start, last, H, h, C)
        Wk = _times_pair(keys, W_hi_ptr, W_lo_ptr, row * H + h, D, V, tl.zeros([C, BV], tl.float32), BD, BV)
        dv += (w * r)[:, None] * Wk
    store_rows(dv_ptr, dv, start, last, Hk, hk, V, 0, C, BV)


@triton.jit
def _key_gradients(
    k_ptr, v_ptr, w_ptr, A_hi_ptr, A_lo_ptr, Wt_hi_ptr, Wt_lo_ptr, dk_ptr, dw_ptr,
    row, start, last, hk, H, Hk, D: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, WITH_KK: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """dk = sum over heads of w r (r A k + W v) - dr r^2 k / ||k||, and dw."""
    keys = load_rows(k_ptr, start, last, Hk, hk, D, 0, C, BD)
    values = load_rows(v_ptr, start, last, Hk, hk, V, 0, C, BV)
    norm, r = _key_scale(keys, NORMALIZE)
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
        slope = tl.where(norm > 0.0, -r * r / tl.where(norm > 0.0, norm, 1.0), 0.0)
        dk += (dr * slope)[:, None] * keys.to(tl.float32)
    store_rows(dk_ptr, dk, start, last, Hk, hk, D, 0, C, BD)


@triton.jit(do_not_specialize=["T", "pieces"])
def token_gradients(
    k_ptr, v_ptr, w_ptr,  # as in add_tokens
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
        _value_gradients(k_ptr, w_ptr, W_hi_ptr, W_lo_ptr, dv_ptr, row, start, last, hk, H, Hk, D, V, C, BD, BV,
                         NORMALIZE)  # fmt: skip
    else:
        _key_gradients(k_ptr, v_ptr, w_ptr, A_hi_ptr, A_lo_ptr, Wt_hi_ptr, Wt_lo_ptr, dk_ptr, dw_ptr, row,
                       start, last, hk, H, Hk, D, V, C, BD, BV, WITH_KK, NORMALIZE)  # fmt: skip


@triton.jit
def _w_dw_before(dw_ptr, w_ptr, start, end, H, h, C: tl.constexpr):
    """w dw [C] of the token before each of a block, in this block; 0 for the first."""
    token = start - 1 + tl.arange(0, C)
    inside = (token >= start) & (token < end)
    dw = tl.load(dw_ptr + token * H + h, mask=inside, other=0.0)
    return dw * tl.load(w_ptr + token * H + h, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["T", "blocks"])
def gate_gradients(
    dw_ptr, w_ptr, to_end_ptr, beta_ptr,  # [B, T, H]
    totals_ptr, d_sums_ptr,  # of sum_blocks for w dw, and the last of F numbers, [B, H, F]
    dg_ptr, dbeta_ptr,  # out: [B, T, H]
    T, blocks, H, F, HAS_BETA: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program for each row, head and block of C tokens."""
    row_and_head, h, _, end, start = _block_of(blocks, T, H, C)
    before = tl.load(d_sums_ptr + row_and_head.to(tl.int64) * F + F - 1).to(tl.float64)
    before += _sum_of_blocks(totals_ptr, row_and_head, 0, tl.program_id(0) % blocks, blocks, N)
    # Of the token before each: a sum less a number would lose that number's digits.
    dg = tl.cumsum(_w_dw_before(dw_ptr, w_ptr, start, end, H, h, C), 0) + before.to(tl.float32)
    store_scalars(dg_ptr, dg, start, end, H, h, C)
    if HAS_BETA:
        dw = load_scalars(dw_ptr, start, end, H, h, C)
        to_end, beta = load_scalars(to_end_ptr, start, end, H, h, C), load_scalars(beta_ptr, start, end, H, h, C)
        store_scalars(dbeta_ptr, 2.0 * dw * to_end * beta, start, end, H, h, C)


class Weighed(NamedTuple):
    """Sums [B, H, F] of a span, and e^E and w [B, T, H], all in float32."""

    sums: Tensor
    to_end: Tensor
    w: Tensor


def launch_span_sums(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, *, normalize: bool, with_kk: bool
) -> Weighed:
    """The sums of a span of tokens, of contiguous inputs.

    Args:
        k, v: [B, T, Hk, D] and [B, T, Hk, V], bfloat16.
        g, beta: [B, T, H], any float dtype.
        normalize: whether keys are divided by their norms.
        with_kk: whether S_kk is among the sums.
    """
    (B, T, Hk, D), V, H = k.shape, v.shape[3], g.shape[2]
    config = span_config(D, V)
    F = (D * D if with_kk else 0) + D * V + 1
    piece = -(-max(config.piece, -(-T // config.pieces)) // config.tokens) * config.tokens
    pieces = -(-T // piece)
    sums = torch.empty(pieces, B, H, F, dtype=torch.float32, device=k.device)
    to_end = torch.empty(B, T, H, dtype=torch.float32, device=k.device)
    w = to_end if beta is None else torch.empty_like(to_end)
    blocks = -(-T // config.scalars)
    with on_device(k.device):
        totals = torch.empty(2, B, H, blocks, dtype=torch.float64, device=k.device)
        launch(sum_blocks, B * H * blocks,
            x_ptr=g, y_ptr=g, totals_ptr=totals,
            T=T, blocks=blocks, H=H, PRODUCT=False, C=config.scalars, num_warps=4, num_stages=1,
        )  # fmt: skip
        launch(weigh_tokens, B * H * blocks,
            g_ptr=g, beta_ptr=g if beta is None else beta, totals_ptr=totals,
            to_end_ptr=to_end, w_ptr=w, sums_ptr=sums,
            T=T, blocks=blocks, H=H, F=F, HAS_BETA=beta is not None, C=config.scalars, N=config.blocks,
            num_warps=4, num_stages=1,
        )  # fmt: skip
        launch(add_tokens, pieces * B * H * (2 if with_kk else 1),
            k_ptr=k, v_ptr=v, w_ptr=w, sums_ptr=sums,
            T=T, pieces=pieces, piece_tokens=piece, H=H, Hk=Hk, D=D, V=V, C=config.tokens,
            BD=config.BD, BV=config.BV, WITH_KK=with_kk, NORMALIZE=normalize, PIPELINE=config.pipeline,
            num_warps=config.warps, num_stages=1,
        )  # fmt: skip
    return Weighed(sums[0] if pieces == 1 else sums.sum(0), to_end, w)


class SpanGradients(NamedTuple):
    """Gradients of k, v, g and beta (None without it), in their dtypes."""

    dk: Tensor
    dv: Tensor
    dg: Tensor
    dbeta: Tensor | None


def launch_span_gradients(
    d_sums: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, to_end: Tensor, w: Tensor, *,
    normalize: bool, with_kk: bool,
) -> SpanGradients:  # fmt: skip
    """Gradients of the inputs of `launch_span_sums` from those of its sums, [B, H, F]; all contiguous."""
    (B, T, Hk, D), V, H = k.shape, v.shape[3], w.shape[2]
    config, F = span_config(D, V), d_sums.shape[2]
    dk, dv, dg, dw = torch.empty_like(k), torch.empty_like(v), torch.empty_like(g), torch.empty_like(w)
    dbeta = None if beta is None else torch.empty_like(beta)
    A_hi, A_lo, W_hi, W_lo, Wt_hi, Wt_lo = _room_for_pairs(B * H, D, V, with_kk, k)
    N = min(64, config.BD, config.BV)
    tiles = -(-D // N) * (-(-V // N) + (-(-D // N) if with_kk else 0))
    with on_device(k.device):
        launch(state_pairs, B * H * tiles,
            d_sums_ptr=d_sums, A_hi_ptr=A_hi, A_lo_ptr=A_lo, W_hi_ptr=W_hi, W_lo_ptr=W_lo, Wt_hi_ptr=Wt_hi,
            Wt_lo_ptr=Wt_lo, D=D, V=V, N=N, WITH_KK=with_kk, num_warps=4, num_stages=1,
        )  # fmt: skip
        pieces = -(-T // config.rows)
        launch(token_gradients, 2 * pieces * B * Hk,
            k_ptr=k, v_ptr=v, w_ptr=w,
            A_hi_ptr=A_hi, A_lo_ptr=A_lo, W_hi_ptr=W_hi, W_lo_ptr=W_lo, Wt_hi_ptr=Wt_hi, Wt_lo_ptr=Wt_lo,
            dk_ptr=dk, dv_ptr=dv, dw_ptr=dw,
            T=T, pieces=pieces, H=H, Hk=Hk, D=D, V=V, C=config.rows, BD=config.BD, BV=config.BV,
            WITH_KK=with_kk, NORMALIZE=normalize, num_warps=config.warps, num_stages=1,
        )  # fmt: skip
        blocks = -(-T // config.scalars)
        totals = torch.empty(B, H, blocks, dtype=torch.float64, device=k.device)
        launch(sum_blocks, B * H * blocks,
            x_ptr=dw, y_ptr=w, totals_ptr=totals,
            T=T, blocks=blocks, H=H, PRODUCT=True, C=config.scalars, num_warps=4, num_stages=1,
        )  # fmt: skip
        launch(gate_gradients, B * H * blocks,
            dw_ptr=dw, w_ptr=w, to_end_ptr=to_end, beta_ptr=w if beta is None else beta,
            totals_ptr=totals, d_sums_ptr=d_sums, dg_ptr=dg, dbeta_ptr=dg if dbeta is None else dbeta,
            T=T, blocks=blocks, H=H, F=F, HAS_BETA=beta is not None, C=config.scalars, N=config.blocks,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return SpanGradients(dk, dv, dg, dbeta)


def _room_for_pairs(n: int, D: int, V: int, with_kk: bool, like: Tensor) -> tuple[Tensor, ...]:
    """A, W and W^T as pairs; without S_kk nothing reads the first."""
    A, W = (n * D * D if with_kk else 8), n * D * V  # 8: what follows is aligned
    return torch.empty(2 * A + 4 * W, dtype=torch.bfloat16, device=like.device).split([A, A, W, W, W, W])
