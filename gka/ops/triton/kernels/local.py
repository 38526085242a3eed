"""Gradients of keys, values, gates and write strengths of a chunk, once both gradient states are known.

With G_ and W_ the gradients of S_kk and S_kv at the chunk's end (`state.scan_gradients`), k as it came,
r = 1 / (||k|| + 1e-6) if normalised, N_{i,c} = e^{G_c - G_i} for c >= i (the transpose of the forward mask):

    p_i = 2 G_i k_i = - [ (N o K Z^T) X + (N o K X^T) Z ]_i
                      - 2 [ b o (K S_kk_0) + ((K K^T) o (N diag(w) N^T) o beta^2 r^2) K ]_i + 2 N_{i,C} (K G_)_i
    W_i v_i         = scale [ (N o V dO^T) Y ]_i + N_{i,C} (V W_^T)_i
    u_i = W_i^T k_i = scale [ (N o K Y^T) dO ]_i + N_{i,C} (K W_)_i
    dk = beta^2 (r p + W v), through the normalisation       dv = beta^2 r u
    dbeta = beta (r^2 <p, k> + 2 r <u, v>)

A gate's gradient is what passes it, from earlier to later. With f = beta^2 r <u, v> + beta^2 r^2 <p, k> / 2, split
into f' from the terms with G_ and W_ (what a key gives to the state at the chunk's end) and f'' from the others,

    dg_t = sum_{s >= t in chunk} (rest - f'')_s + sum_{s < t in chunk} f'_s + e^{G_C} (<G_, S_kk_0> + <W_, S_kv_0>)

where nothing large cancels: G_ and W_ may be rounded to 16 bits.

x is large along directions that no key has, and what multiplies it there nearly cancels. So in dk the two
factors of X, alpha o V dO^T and r K Z^T, are subtracted first; and <p, k>, <u, v> are summed from scores in
float32, not from p and u, which are rounded sums of long vectors. `value_gradients` forms what multiplies X, Z, K
and Q in dk, and the part of <p, k> that stems from them; `key_gradients` the products and the rest.

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
    lo_of,
    load_matrix,
    load_rows,
    load_scalars,
    log_decays,
    past_mask,
    rough,
    store_matrix,
    store_rows,
    store_scalars,
)


@triton.jit
def _scores(
    k_ptr, start, end, Hk, hk, hi_ptr, lo_ptr, row, stop, rows_H, rows_h, rows_D, D: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """K X^T [C, C] with rows X that are kept as pairs, 64 columns at a time."""
    scores = tl.zeros([C, C], tl.float32)
    for part in tl.static_range(BD // 64):
        tl.debug_barrier()
        K = rough(load_rows(k_ptr, start, end, Hk, hk, D, part * 64, C, 64), WIDE)
        hi = load_rows(hi_ptr, row, stop, rows_H, rows_h, rows_D, part * 64, C, 64)
        scores = dot(K, tl.trans(rough(hi, WIDE)), scores, WIDE)
        if not WIDE:
            lo = lo_of(hi, load_rows(lo_ptr, row, stop, rows_H, rows_h, rows_D, part * 64, C, 64))
            scores = dot(K, tl.trans(lo), scores, WIDE)
    return scores


@triton.jit
def _from_end(
    k_ptr, start, end, Hk, hk, hi_ptr, lo_ptr, program, acc, D: tl.constexpr, columns: tl.constexpr,
    column: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """acc + K times a gradient [D, columns] that is kept as a pair, BLOCK columns from `column`.

    64 rows at a time: more would not fit into registers.
    """
    for part in tl.static_range(BD // 64):
        tl.debug_barrier()
        K = rough(load_rows(k_ptr, start, end, Hk, hk, D, part * 64, C, 64), WIDE)
        hi = load_matrix(hi_ptr, program, D, columns, part * 64, column, 64, BLOCK)
        if not WIDE:
            lo = lo_of(hi, load_matrix(lo_ptr, program, D, columns, part * 64, column, 64, BLOCK))
            acc = dot(K, lo, acc, WIDE)
        acc = dot(K, hi, acc, WIDE)
    return acc


@triton.jit(do_not_specialize=["first_chunk"])
def value_gradients(
    q_ptr, k_ptr, v_ptr, g_ptr, alpha_ptr, beta_ptr, query_scale_ptr, key_scale_ptr,
    x_hi_ptr, x_lo_ptr, z_hi_ptr, z_lo_ptr, do_ptr,  # [tokens, H, D], z [chunks, H, C, BD], [tokens, H, V]
    w_ptr,  # [tokens, H] float32, from `query_gradients`
    d_kv_hi_ptr, d_kv_lo_ptr,  # W_, [chunks, H, D, V]
    dv_ptr, scores_ptr,  # out: [tokens, H, V]; of X, Z, K, Q in dk, [chunks, H, 4, C, C]
    written_ptr, written_end_ptr,  # out: <u, v> but for the term with W_, and that term, [tokens, H] float32
    along_ptr,  # out: part of <p, k>, [tokens, H] float32
    chunk_ptr, scale, first_chunk, H, Hk, D: tl.constexpr, V: tl.constexpr,
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
    beta, key_scale = key_weights(beta_ptr, key_scale_ptr, start, end, H, h, Hk, hk, C, HAS_BETA, NORMALIZE)
    query_scale = tl.full([C], 1.0, tl.float32)
    if NORMALIZE:
        query_scale = load_scalars(query_scale_ptr, start, end, H, h, C)
    K = rough(load_rows(k_ptr, start, end, Hk, hk, D, 0, C, BD), WIDE)
    zeros = tl.zeros([C, C], tl.float32)
    alpha = tl.full([C], 1.0, tl.float32)
    if HAS_ALPHA:
        alpha = load_scalars(alpha_ptr, start, end, H, h, C)

    unmasked = zeros
    if SOLVE:
        kept = dot(K, tl.trans(K), zeros, WIDE)
        meeting = dot(rough(N * load_scalars(w_ptr, start, end, H, h, C)[None, :], WIDE),
                      rough(past_mask(G, C), WIDE), zeros, WIDE)  # fmt: skip
        meeting = kept * meeting * (-2.0 * beta * beta * key_scale * key_scale)[None, :]
        along = tl.sum(meeting * kept, 1)
        store_matrix(scores_ptr, meeting * key_scale[:, None], first + 2, C, C, 0, 0, C, C)
        x_scores = _scores(k_ptr, start, end, Hk, hk, x_hi_ptr, x_lo_ptr, start, end, H, h, D, D, C, BD, WIDE)
        unmasked = x_scores * alpha[None, :]
        x_scores = x_scores * -N
        store_matrix(scores_ptr, x_scores * key_scale[:, None], first + 1, C, C, 0, 0, C, C)
        z_scores = _scores(k_ptr, start, end, Hk, hk, z_hi_ptr, z_lo_ptr, row, row + C, 1, 0, BD, D, C, BD, WIDE)
        store_scalars(along_ptr, along + 2.0 * tl.sum(z_scores * x_scores, 1), start, end, H, h, C)
        z_scores = z_scores * -N * key_scale[:, None]
    share = query_scale
    if HAS_ALPHA or not SOLVE:
        if SOLVE:
            share = query_scale * (1.0 - alpha)
        Q = rough(load_rows(q_ptr, start, end, H, h, D, 0, C, BD), WIDE)
        unmasked += dot(K, tl.trans(Q), zeros, WIDE) * share[None, :]
    write = zeros
    for block in tl.static_range(BLOCKS):
        values = rough(load_rows(v_ptr, start, end, Hk, hk, V, block * BV, C, BV), WIDE)
        dO = rough(load_rows(do_ptr, start, end, H, h, V, block * BV, C, BV), WIDE)
        write = dot(values, tl.trans(dO), write, WIDE)
    write = write * N * scale
    if SOLVE:
        store_matrix(scores_ptr, write * alpha[None, :] + z_scores, first, C, C, 0, 0, C, C)
    if HAS_ALPHA or not SOLVE:
        store_matrix(scores_ptr, write * share[None, :], first + 3, C, C, 0, 0, C, C)
    store_scalars(written_ptr, tl.sum(unmasked * write, 1), start, end, H, h, C)
    read = rough(unmasked * N * scale, WIDE)

    to_end = tl.exp(last_of(G, C) - G)
    written_end = tl.zeros([C], tl.float32)
    for block in tl.static_range(BLOCKS):
        u = _from_end(k_ptr, start, end, Hk, hk, d_kv_hi_ptr, d_kv_lo_ptr, program, tl.zeros([C, BV], tl.float32),
                      D, V, block * BV, C, BD, BV, WIDE) * to_end[:, None]  # fmt: skip
        values = load_rows(v_ptr, start, end, Hk, hk, V, block * BV, C, BV).to(tl.float32)
        written_end += tl.sum(u * values, 1)
        dO = rough(load_rows(do_ptr, start, end, H, h, V, block * BV, C, BV), WIDE)
        u = dot(read, dO, u, WIDE)
        store_rows(dv_ptr, u * (beta * beta * key_scale)[:, None], start, end, H, h, V, block * BV, C, BV)
    store_scalars(written_end_ptr, written_end, start, end, H, h, C)


@triton.jit(do_not_specialize=["first_chunk"])
def key_gradients(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, key_scale_ptr,
    x_ptr, z_ptr,  # hi, [tokens, H, D], [chunks, H, C, BD]
    b_ptr, rest_ptr, written_ptr, written_end_ptr, along_ptr,  # [tokens, H] float32, from the kernels before
    scores_ptr,  # [chunks, H, 4, C, C], from `value_gradients`
    kk_ptr, d_kk_hi_ptr, d_kk_lo_ptr, d_kv_hi_ptr, d_kv_lo_ptr,  # S_kk_0 (hi), G_, W_, [chunks, H, D, D | V]
    through_ptr,  # [chunks, H, 2, D] float32, from `scan_gradients`
    dk_ptr, dg_ptr, dbeta_ptr,  # out: [tokens, H, D], [tokens, H] twice
    chunk_ptr, first_chunk, H, Hk, D: tl.constexpr, V: tl.constexpr,
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
    to_end = tl.exp(last_of(G, C) - G)
    beta, key_scale = key_weights(beta_ptr, key_scale_ptr, start, end, H, h, Hk, hk, C, HAS_BETA, NORMALIZE)
    keys = load_rows(k_ptr, start, end, Hk, hk, D, 0, C, BD)
    dk = tl.zeros([C, BD], tl.float32)
    along = tl.zeros([C], tl.float32)
    along_end = tl.zeros([C], tl.float32)
    # What comes from the chunk's end: K G_ and V W_^T, each large where no key is, nearly cancel in their sum.
    if SOLVE:
        K = rough(keys, WIDE)
        dk = _from_end(k_ptr, start, end, Hk, hk, d_kk_hi_ptr, d_kk_lo_ptr, program, dk, D, D, 0, C, BD, BD, WIDE)
        along_end = tl.sum(dk * load_rows(k_ptr, start, end, Hk, hk, D, 0, C, BD).to(tl.float32), 1) * 2.0 * to_end
        dk = dk * (2.0 * key_scale)[:, None]
    for block in tl.static_range(BLOCKS):
        for part in tl.static_range(BV // 64):
            tl.debug_barrier()
            column = block * BV + part * 64
            values = rough(load_rows(v_ptr, start, end, Hk, hk, V, column, C, 64), WIDE)
            W = load_matrix(d_kv_hi_ptr, program, D, V, 0, column, BD, 64)
            if not WIDE:
                W_lo = lo_of(W, load_matrix(d_kv_lo_ptr, program, D, V, 0, column, BD, 64))
                dk = dot(values, tl.trans(W_lo), dk, WIDE)
            dk = dot(values, tl.trans(W), dk, WIDE)
    dk = dk * to_end[:, None]
    if SOLVE:
        tl.debug_barrier()
        S = load_matrix(kk_ptr, program, D, D, 0, 0, BD, BD)
        S_keys = dot(K, S, tl.zeros([C, BD], tl.float32), WIDE)
        S_keys = S_keys * (-2.0 * load_scalars(b_ptr, start, end, H, h, C))[:, None]
        along = load_scalars(along_ptr, start, end, H, h, C) + tl.sum(
            S_keys * load_rows(k_ptr, start, end, Hk, hk, D, 0, C, BD).to(tl.float32), 1
        )
        dk += S_keys * key_scale[:, None]
        tl.debug_barrier()
        weights = rough(load_matrix(scores_ptr, first + 2, C, C, 0, 0, C, C), WIDE)
        dk = dot(weights, K, dk, WIDE)
        tl.debug_barrier()
        Z = rough(load_rows(z_ptr, row, row + C, 1, 0, BD, 0, C, BD), WIDE)
        weights = rough(load_matrix(scores_ptr, first + 1, C, C, 0, 0, C, C), WIDE)
        dk = dot(weights, Z, dk, WIDE)
        tl.debug_barrier()
        X = rough(load_rows(x_ptr, start, end, H, h, D, 0, C, BD), WIDE)
        weights = rough(load_matrix(scores_ptr, first, C, C, 0, 0, C, C), WIDE)
        dk = dot(weights, X, dk, WIDE)
    if HAS_ALPHA or not SOLVE:
        tl.debug_barrier()
        Q = rough(load_rows(q_ptr, start, end, H, h, D, 0, C, BD), WIDE)
        weights = rough(load_matrix(scores_ptr, first + 3, C, C, 0, 0, C, C), WIDE)
        dk = dot(weights, Q, dk, WIDE)
    dk = dk * (beta * beta)[:, None]
    if NORMALIZE:
        k = load_rows(k_ptr, start, end, Hk, hk, D, 0, C, BD).to(tl.float32)
        norm = tl.sqrt(tl.sum(k * k, 1))
        aside = tl.where(norm > 0.0, tl.sum(k * dk, 1) * key_scale / norm, 0.0)
        dk = (dk - k * aside[:, None]) * key_scale[:, None]
    store_rows(dk_ptr, dk, start, end, H, h, D, 0, C, BD)
    written = load_scalars(written_ptr, start, end, H, h, C)
    written_end = load_scalars(written_end_ptr, start, end, H, h, C)
    weight = beta * beta * key_scale
    later = load_scalars(rest_ptr, start, end, H, h, C) - weight * (written + 0.5 * key_scale * along)
    earlier = weight * (written_end + 0.5 * key_scale * along_end)
    d = tl.arange(0, BD)
    through = tl.load(through_ptr + program * 2 * D + D + d, mask=d < D, other=0.0)
    if SOLVE:
        through += tl.load(through_ptr + program * 2 * D + d, mask=d < D, other=0.0)
    dg = tl.cumsum(later, 0, reverse=True) + tl.cumsum(earlier, 0) - earlier + tl.sum(through, 0)
    store_scalars(dg_ptr, dg, start, end, H, h, C)
    if HAS_BETA:
        dbeta = beta * key_scale * (key_scale * (along + along_end) + 2.0 * (written + written_end))
        store_scalars(dbeta_ptr, dbeta, start, end, H, h, C)
