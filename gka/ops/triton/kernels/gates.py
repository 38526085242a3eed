"""The gates of the layer from their projections, forward and backward.

    u = raw_g + dt_bias         g = -e^{A_log} log(1 + e^u) real        dA_log = sum over tokens of dg g
    du = -dg e^{A_log} s(u) real                                        ddt_bias = sum over tokens of du
    beta = (s(raw_beta + b_beta) + 1e-6) real                           alpha = s(raw_alpha + b_alpha)
    draw_beta = dbeta s (1 - s) real, draw_alpha likewise               db = sum over tokens of draw

with s(u) = 1 / (1 + e^{-u}), and real = 0 for padding, otherwise 1. A row of raw has the projections of all gates,
one after the other. Backwards a program takes every P-th block of rows. It adds up its part of the sums over
tokens in registers, for each row of a block apart, and sums over these rows once, at its end. All arithmetic is
float32.

Legend: N tokens; H heads; G the number of gates, 1 to 3; F the number of vectors A_log, dt_bias, b_beta, b_alpha;
R rows at a time; BH power of two, at least H; P programs.
"""

import triton
import triton.language as tl

from .arithmetic import cast


@triton.jit
def _rows_of(block, N, H: tl.constexpr, R: tl.constexpr, BH: tl.constexpr):
    """Of R rows: their numbers [R, 1] int64, the heads [1, BH], and which of both there are [R, BH]."""
    n = block.to(tl.int64) * R + tl.arange(0, R)[:, None]
    h = tl.arange(0, BH)[None, :]
    return n, h, (n < N) & (h < H)


@triton.jit
def _vector(vectors_ptr, number: tl.constexpr, H: tl.constexpr, BH: tl.constexpr):
    h = tl.arange(0, BH)[None, :]
    return tl.load(vectors_ptr + number * H + h, mask=h < H, other=0.0)


@triton.jit
def _log_1p_exp(u):
    """log(1 + e^u). log(w) / (w - 1) is nearly the same for w = 1 + e and for w rounded, which loses bits of e."""
    e = tl.exp(-tl.abs(u))
    w = 1.0 + e
    small = w == 1.0
    return tl.maximum(u, 0.0) + tl.where(small, e, tl.log(w) * (e / tl.where(small, 1.0, w - 1.0)))


@triton.jit
def _real(real_ptr, n, N, MASKED: tl.constexpr):
    """1 for tokens and 0 for padding, [R, 1]."""
    if MASKED:
        return tl.load(real_ptr + n, mask=n < N, other=0).to(tl.float32)
    else:
        return 1.0


@triton.jit(do_not_specialize=["N"])
def gate_values(
    raw_ptr, vectors_ptr, real_ptr,  # [N, G H], [F, H] float32, [N] int8 if MASKED
    g_ptr, beta_ptr, alpha_ptr,  # out: [N, H] float32, as far as there are
    N,
    H: tl.constexpr, FORGET: tl.constexpr, WRITE: tl.constexpr, SOLVE: tl.constexpr, MASKED: tl.constexpr,
    R: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    n, h, inside = _rows_of(tl.program_id(0), N, H, R, BH)
    real = _real(real_ptr, n, N, MASKED)
    raw = raw_ptr + n * ((FORGET + WRITE + SOLVE) * H) + h
    if FORGET:
        u = tl.load(raw, mask=inside, other=0.0).to(tl.float32) + _vector(vectors_ptr, 1, H, BH)
        g = -tl.exp(_vector(vectors_ptr, 0, H, BH)) * _log_1p_exp(u) * real
        tl.store(g_ptr + n * H + h, g, mask=inside)
    if WRITE:
        u = tl.load(raw + FORGET * H, mask=inside, other=0.0).to(tl.float32)
        u += _vector(vectors_ptr, 2 * FORGET, H, BH)
        tl.store(beta_ptr + n * H + h, (tl.sigmoid(u) + 1e-6) * real, mask=inside)
    if SOLVE:
        u = tl.load(raw + (FORGET + WRITE) * H, mask=inside, other=0.0).to(tl.float32)
        u += _vector(vectors_ptr, 2 * FORGET + WRITE, H, BH)
        tl.store(alpha_ptr + n * H + h, tl.sigmoid(u), mask=inside)


@triton.jit
def _sigmoid_gradient(raw, bias, d_ptr, n, h, inside, H: tl.constexpr):
    """draw [R, BH] of s(raw + bias), from the gradient of s in memory."""
    s = tl.sigmoid(tl.load(raw, mask=inside, other=0.0).to(tl.float32) + bias)
    return tl.load(d_ptr + n * H + h, mask=inside, other=0.0) * (s - s * s)


@triton.jit
def _store_sum(parts_ptr, x, number: tl.constexpr, F: tl.constexpr, H: tl.constexpr, BH: tl.constexpr):
    h = tl.arange(0, BH)
    tl.store(parts_ptr + (tl.program_id(0) * F + number) * H + h, tl.sum(x, 0), mask=h < H)


@triton.jit(do_not_specialize=["N"])
def gate_gradients(
    dg_ptr, dbeta_ptr, dalpha_ptr,  # [N, H] float32, as far as there are
    raw_ptr, vectors_ptr, real_ptr,  # [N, G H], [F, H] float32, [N] int8 if MASKED
    draw_ptr, parts_ptr,  # out: [N, G H], [P, F, H] float32, the gradient of the vectors by programs
    N,
    H: tl.constexpr, FORGET: tl.constexpr, WRITE: tl.constexpr, SOLVE: tl.constexpr, MASKED: tl.constexpr,
    R: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    F: tl.constexpr = 2 * FORGET + WRITE + SOLVE
    dtype = draw_ptr.dtype.element_ty
    dA_log = tl.zeros([R, BH], tl.float32)
    ddt_bias, db_beta, db_alpha = dA_log, dA_log, dA_log
    for done in range(0, tl.cdiv(N, R), tl.num_programs(0)):  # blocks; in the last round some of none
        n, h, inside = _rows_of(tl.program_id(0) + done, N, H, R, BH)
        real = _real(real_ptr, n, N, MASKED)
        place = n * ((FORGET + WRITE + SOLVE) * H) + h
        if FORGET:
            u = tl.load(raw_ptr + place, mask=inside, other=0.0).to(tl.float32) + _vector(vectors_ptr, 1, H, BH)
            dg = tl.load(dg_ptr + n * H + h, mask=inside, other=0.0) * real
            dg *= -tl.exp(_vector(vectors_ptr, 0, H, BH))
            du = dg * tl.sigmoid(u)
            dA_log += dg * _log_1p_exp(u)
            ddt_bias += du
            tl.store(draw_ptr + place, cast(du, dtype), mask=inside)
        if WRITE:
            bias = _vector(vectors_ptr, 2 * FORGET, H, BH)
            du = _sigmoid_gradient(raw_ptr + place + FORGET * H, bias, dbeta_ptr, n, h, inside, H) * real
            db_beta += du
            tl.store(draw_ptr + place + FORGET * H, cast(du, dtype), mask=inside)
        if SOLVE:
            bias = _vector(vectors_ptr, 2 * FORGET + WRITE, H, BH)
            du = _sigmoid_gradient(raw_ptr + place + (FORGET + WRITE) * H, bias, dalpha_ptr, n, h, inside, H)
            db_alpha += du
            tl.store(draw_ptr + place + (FORGET + WRITE) * H, cast(du, dtype), mask=inside)
    if FORGET:
        _store_sum(parts_ptr, dA_log, 0, F, H, BH)
        _store_sum(parts_ptr, ddt_bias, 1, F, H, BH)
    if WRITE:
        _store_sum(parts_ptr, db_beta, 2 * FORGET, F, H, BH)
    if SOLVE:
        _store_sum(parts_ptr, db_alpha, 2 * FORGET + WRITE, F, H, BH)
