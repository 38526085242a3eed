"""Gradients of keys, values, gates and write strengths of a chunk, once both gradient states are known.

With G_ and W_ the gradients of S_kk and S_kv at the chunk's end (`state.scan_gradients`), k as it came,
r = 1 / (||k|| + 1e-6) if normalised, N_{i,c} = e^{G_c - G_i} for c >= i (the transpose of the forward mask):

    p_i = 2 G_i k_i = - [ (N o K Z^T) X + (N o K X^T) Z ]_i
                      - 2 [ b o (K S_kk_0) + ((K K^T) o (N diag(w) N^T) o beta^2 r^2) K ]_i + 2 N_{i,C} (K G_)_i
    W_i v_i         = scale [ (N o V dO^T) Y ]_i + N_{i,C} (V W_^T)_i
    u_i = W_i^T k_i = scale [ (N o K Y^T) dO ]_i + N_{i,C} (K W_)_i
    dk = beta^2 (r p + W v), through the normalisation       dv = beta^2 r u
    dbeta = beta (r^2 <p, k> + 2 r <u, v>)
    dg_t = sum_{s >= t in chunk} (rest - beta^2 r <u, v> - beta^2 r^2 <p, k> / 2)_s + <G_, S_kk> + <W_, S_kv>

x is large along directions that no key has, and what multiplies it there nearly cancels. So in dk the two
factors of X, alpha o V dO^T and r K Z^T, are subtracted first; and <p, k>, <u, v> are summed from scores in
float32, not from p and u, which are rounded sums of long vectors. `key_scores` forms what multiplies X, Z, K and
Q in dk, and the part of <p, k> that stems from them; `key_gradients` the products and the rest.

Legend: C tokens of a chunk; i, j, c tokens in it; H query heads, Hk key/value heads; D key dim, V value dim.
"""

import triton
import triton.language as tl

from .common import (
    chunk_of,
    dot,
    future_mask,
    key_weights,
    last_of,
    load_matrix,
    load_rows,
    load_scalars,
    log_decays,
    past_mask,
    remainder,
    rough,
    store_matrix,
    store_rows,
    store_scalars,
)
from .state import blend


@triton.jit(do_not_specialize=["first_chunk"])
def value_gradients(
    q_ptr, k_ptr, v_ptr, g_ptr, alpha_ptr, beta_ptr, query_scale_ptr, key_scale_ptr,
    x_ptr, do_ptr,  # [tokens, H, D] float32, [tokens, H, V]
    d_kv_hi_ptr, d_kv_lo_ptr,  # W_, [chunks, H, D, V]
    dv_ptr, written_ptr,  # out: [tokens, H, V]; <u, v> [tokens, H] float32
    chunk_ptr, scale, first_chunk, H, Hk, D, V,
    C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr,
    SOLVE: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    h, local = program % H, program // H
    start, end = chunk_of(chunk_ptr, first_chunk + local)
    if start >= end:
        return
    hk = h // (H // Hk)
    G = log_decays(g_ptr, start, end, H, h, C)
    to_end = tl.exp(last_of(G, C) - G)
    beta, key_scale = key_weights(beta_ptr, key_scale_ptr, start, end, H, h, Hk, hk, C, HAS_BETA, NORMALIZE)
    K = rough(load_rows(k_ptr, start, end, Hk, hk, D, 0, C, BD), WIDE)
    y = blend(q_ptr, x_ptr, alpha_ptr, query_scale_ptr, start, end, H, h, D, C, BD, SOLVE, HAS_ALPHA, NORMALIZE)
    read = dot(K, tl.trans(rough(y, WIDE)), tl.zeros([C, C], tl.float32), WIDE)
    if not WIDE:
        read = dot(K, tl.trans(remainder(y, WIDE)), read, WIDE)
    read = read * future_mask(G, C) * scale
    written = tl.zeros([C], tl.float32)
    for block in tl.static_range(BLOCKS):
        values = load_rows(v_ptr, start, end, Hk, hk, V, block * BV, C, BV)
        dO = rough(load_rows(do_ptr, start, end, H, h, V, block * BV, C, BV), WIDE)
        W = load_matrix(d_kv_hi_ptr, program, D, V, 0, block * BV, BD, BV)
        write = dot(rough(values, WIDE), tl.trans(dO), tl.zeros([C, C], tl.float32), WIDE)
        written += tl.sum(read * write, 1)
        u = dot(K, W, tl.zeros([C, BV], tl.float32), WIDE)
        if not WIDE:
            W = load_matrix(d_kv_lo_ptr, program, D, V, 0, block * BV, BD, BV)
            u = dot(K, W, u, WIDE)
        u = u * to_end[:, None]
        written += tl.sum(u * values.to(tl.float32), 1)
        u = dot(rough(read, WIDE), dO, u, WIDE)
        store_rows(dv_ptr, u * (beta * beta * key_scale)[:, None], start, end, H, h, V, block * BV, C, BV)
    store_scalars(written_ptr, written, start, end, H, h, C)


@triton.jit(do_not_specialize=["first_chunk"])
def key_scores(
    k_ptr, v_ptr, g_ptr, alpha_ptr, beta_ptr, query_scale_ptr, key_scale_ptr,
    x_ptr, z_ptr, do_ptr,  # [tokens, H, D] float32, [chunks, H, C, BD] float32, [tokens, H, V]
    w_ptr,  # [tokens, H] float32, from `query_gradients`
    scores_ptr, along_ptr,  # out: [chunks, H, 4, C, C], of X, Z, K, Q; part of <p, k> [tokens, H] float32
    chunk_ptr, scale, first_chunk, H, Hk, D, V,
    C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr,
    SOLVE: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    h, local = program % H, program // H
    start, end = chunk_of(chunk_ptr, first_chunk + local)
    if start >= end:
        return
    hk, row, first = h // (H // Hk), program * C, program * 4
    G = log_decays(g_ptr, start, end, H, h, C)
    N = future_mask(G, C)
    zeros = tl.zeros([C, C], tl.float32)
    write = zeros
    for block in tl.static_range(BLOCKS):
        values = rough(load_rows(v_ptr, start, end, Hk, hk, V, block * BV, C, BV), WIDE)
        dO = rough(load_rows(do_ptr, start, end, H, h, V, block * BV, C, BV), WIDE)
        write = dot(values, tl.trans(dO), write, WIDE)
    write = write * N * scale
    if SOLVE:
        beta, key_scale = key_weights(beta_ptr, key_scale_ptr, start, end, H, h, Hk, hk, C, HAS_BETA, NORMALIZE)
        K = rough(load_rows(k_ptr, start, end, Hk, hk, D, 0, C, BD), WIDE)
        scores = dot(K, tl.trans(K), zeros, WIDE)
        meeting = dot(rough(N * load_scalars(w_ptr, start, end, H, h, C)[None, :], WIDE),
                      rough(past_mask(G, C), WIDE), zeros, WIDE)  # fmt: skip
        meeting = scores * meeting * (-2.0 * beta * beta * key_scale * key_scale)[None, :]
        along = tl.sum(meeting * scores, 1)
        store_matrix(scores_ptr, meeting * key_scale[:, None], first + 2, C, C, 0, 0, C, C)
        x = load_rows(x_ptr, start, end, H, h, D, 0, C, BD)
        x_scores = dot(K, tl.trans(rough(x, WIDE)), zeros, WIDE)
        if not WIDE:
            x_scores = dot(K, tl.trans(remainder(x, WIDE)), x_scores, WIDE)
        x_scores = x_scores * -N
        store_matrix(scores_ptr, x_scores * key_scale[:, None], first + 1, C, C, 0, 0, C, C)
        z = load_rows(z_ptr, row, row + C, 1, 0, BD, 0, C, BD)
        z_scores = dot(K, tl.trans(rough(z, WIDE)), zeros, WIDE)
        if not WIDE:
            z_scores = dot(K, tl.trans(remainder(z, WIDE)), z_scores, WIDE)
        along += 2.0 * tl.sum(z_scores * x_scores, 1)
        store_scalars(along_ptr, along, start, end, H, h, C)
        alpha = tl.full([C], 1.0, tl.float32)
        if HAS_ALPHA:
            alpha = load_scalars(alpha_ptr, start, end, H, h, C)
        of_x = write * alpha[None, :] - z_scores * N * key_scale[:, None]
        store_matrix(scores_ptr, of_x, first, C, C, 0, 0, C, C)
        write = write * (1.0 - alpha)[None, :]
    if HAS_ALPHA or not SOLVE:
        if NORMALIZE:
            write = write * load_scalars(query_scale_ptr, start, end, H, h, C)[None, :]
        store_matrix(scores_ptr, write, first + 3, C, C, 0, 0, C, C)


@triton.jit(do_not_specialize=["first_chunk"])
def key_gradients(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, key_scale_ptr,
    x_ptr, z_ptr,  # [tokens, H, D] float32, [chunks, H, C, BD] float32
    b_ptr, rest_ptr, written_ptr, along_ptr,  # [tokens, H] float32, from the kernels before
    scores_ptr,  # [chunks, H, 4, C, C], from `key_scores`
    kk_ptr, d_kk_hi_ptr, d_kk_lo_ptr, d_kv_ptr,  # S_kk_0 (hi), G_, W_ (hi), [chunks, H, D, D | V]
    ends_ptr,  # [NT, H, 2, D] float32, from `scan_gradients`
    dk_ptr, dg_ptr, dbeta_ptr,  # out: [tokens, H, D], [tokens, H] twice
    chunk_ptr, first_chunk, H, Hk, D, V,
    C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr,
    SOLVE: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    h, local = program % H, program // H
    chunk = first_chunk + local
    start, end = chunk_of(chunk_ptr, chunk)
    if start >= end:
        return
    hk, row, first = h // (H // Hk), program * C, program * 4
    G = log_decays(g_ptr, start, end, H, h, C)
    to_end = tl.exp(last_of(G, C) - G)
    beta, key_scale = key_weights(beta_ptr, key_scale_ptr, start, end, H, h, Hk, hk, C, HAS_BETA, NORMALIZE)
    keys = load_rows(k_ptr, start, end, Hk, hk, D, 0, C, BD)
    dk = tl.zeros([C, BD], tl.float32)
    along = tl.zeros([C], tl.float32)
    if SOLVE:
        K = rough(keys, WIDE)
        S = load_matrix(d_kk_hi_ptr, program, D, D, 0, 0, BD, BD)
        dk = dot(K, S, dk, WIDE)
        if not WIDE:
            S = load_matrix(d_kk_lo_ptr, program, D, D, 0, 0, BD, BD)
            dk = dot(K, S, dk, WIDE)
        S = load_matrix(kk_ptr, program, D, D, 0, 0, BD, BD)
        squeezed = dot(K, S, tl.zeros([C, BD], tl.float32), WIDE)
        dk = 2.0 * (dk * to_end[:, None] - squeezed * load_scalars(b_ptr, start, end, H, h, C)[:, None])
        along = load_scalars(along_ptr, start, end, H, h, C) + tl.sum(dk * keys.to(tl.float32), 1)
        dk = dk * key_scale[:, None]
        weights = rough(load_matrix(scores_ptr, first + 2, C, C, 0, 0, C, C), WIDE)
        dk = dot(weights, K, dk, WIDE)
        Z = rough(load_rows(z_ptr, row, row + C, 1, 0, BD, 0, C, BD), WIDE)
        weights = rough(load_matrix(scores_ptr, first + 1, C, C, 0, 0, C, C), WIDE)
        dk = dot(weights, Z, dk, WIDE)
        X = rough(load_rows(x_ptr, start, end, H, h, D, 0, C, BD), WIDE)
        weights = rough(load_matrix(scores_ptr, first, C, C, 0, 0, C, C), WIDE)
        dk = dot(weights, X, dk, WIDE)
    if HAS_ALPHA or not SOLVE:
        Q = rough(load_rows(q_ptr, start, end, H, h, D, 0, C, BD), WIDE)
        weights = rough(load_matrix(scores_ptr, first + 3, C, C, 0, 0, C, C), WIDE)
        dk = dot(weights, Q, dk, WIDE)
    for block in tl.static_range(BLOCKS):
        W = load_matrix(d_kv_ptr, program, D, V, 0, block * BV, BD, BV)
        values = load_rows(v_ptr, start, end, Hk, hk, V, block * BV, C, BV).to(tl.float32)
        dk = dot(rough(values * to_end[:, None], WIDE), tl.trans(W), dk, WIDE)

    dk = dk * (beta * beta)[:, None]
    if NORMALIZE:
        k = keys.to(tl.float32)
        norm = tl.sqrt(tl.sum(k * k, 1))
        aside = tl.where(norm > 0.0, tl.sum(k * dk, 1) * key_scale / norm, 0.0)
        dk = (dk - k * aside[:, None]) * key_scale[:, None]
    store_rows(dk_ptr, dk, start, end, H, h, D, 0, C, BD)
    written = load_scalars(written_ptr, start, end, H, h, C)
    rest = load_scalars(rest_ptr, start, end, H, h, C)
    rest -= beta * beta * key_scale * (written + 0.5 * key_scale * along)
    d = tl.arange(0, BD)
    ends = tl.load(ends_ptr + (chunk * H + h) * 2 * D + D + d, mask=d < D, other=0.0)
    if SOLVE:
        ends += tl.load(ends_ptr + (chunk * H + h) * 2 * D + d, mask=d < D, other=0.0)
    store_scalars(dg_ptr, tl.cumsum(rest, 0, reverse=True) + tl.sum(ends, 0), start, end, H, h, C)
    if HAS_BETA:
        dbeta = beta * key_scale * (key_scale * along + 2.0 * written)
        store_scalars(dbeta_ptr, dbeta, start, end, H, h, C)
