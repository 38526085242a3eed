"""Gradients of keys, values, gates and write strengths of a chunk, once both gradient states are known.

With G_ and W_ the gradients of S_kk and S_kv at the chunk's end (`state_gradients.scan_gradients`), k as it came,
r = 1 / (||k|| + 1e-6) if normalised, N_{i,c} = e^{G_c - G_i} for c >= i (the transpose of the forward mask),
m = sum_M_w_zeta of `state_gradients`:

    p_i = 2 G_i k_i = - [ (N o K Z^T) X + (N o K X^T) Z ]_i
                      - 2 [ m o (K S_kk_0) + ((K K^T) o (N diag(w) N^T) o beta^2 r^2) K ]_i + 2 N_{i,C} (K G_)_i
    W_i v_i         = scale [ (N o V dO^T) Y ]_i + N_{i,C} (V W_^T)_i
    u_i = W_i^T k_i = scale [ (N o K Y^T) dO ]_i + N_{i,C} (K W_)_i
    dk = beta^2 (r p + W v), through the normalisation       dv = beta^2 r u
    dbeta = beta (r^2 <p, k> + 2 r <u, v>)

A gate's gradient is what passes it, from earlier to later. With f = beta^2 r <u, v> + beta^2 r^2 <p, k> / 2, split
into f' from the terms with G_ and W_ (what a key gives to the state at the chunk's end) and f'' from the others,

    dg_t = sum_{s >= t in chunk} (<y, dy> - <A z, x> - f'')_s + sum_{s < t in chunk} f'_s
           + e^{G_C} (<G_, S_kk_0> + <W_, S_kv_0>)

where nothing large cancels.

x is large along directions that no key has, and what multiplies it there nearly cancels. So in dk the two
factors of X, alpha o V dO^T and r K Z^T, are subtracted first; and <p, k>, <u, v> are summed from scores in
float32, not from p and u, which are rounded sums of long vectors. `value_gradients` forms what multiplies X, Z, K
and Q in dk, and the part of <p, k> that stems from them; `key_gradients` the products and the rest.

Legend: C tokens of a chunk; i, j, c tokens in it; H query heads, Hk key/value heads; D key dim, V value dim.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..call import BackwardWorkspace, Call, Part, Scales, keys_and_values
from ..launch import launch
from .arithmetic import dot, through_registers, to_operand
from .common import (
    both_masks,
    head_and_chunk,
    key_weights,
    last_of,
    load_matrix,
    load_matrix_operands,
    load_operands,
    load_rows,
    load_scalars,
    log_decays,
    store_matrix,
    store_rows,
    store_scalars,
    sums_of_later,
)


@triton.jit
def _scores(
    k_ptr, start, end, Hk, hk, hi_ptr, lo_ptr, row, stop, rows_H, rows_h, rows_D, D: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, PIPELINE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """K X^T [C, C] with rows X that are kept as pairs, 64 columns at a time."""
    scores = tl.zeros([C, C], tl.float32)
    for part in tl.range(BD // 64, num_stages=PIPELINE, loop_unroll_factor=1 if PIPELINE > 1 else BD // 64):
        if PIPELINE == 1:
            tl.debug_barrier()
        K = to_operand(load_rows(k_ptr, start, end, Hk, hk, D, part * 64, C, 64), WIDE)
        hi, lo = load_operands(hi_ptr, lo_ptr, row, stop, rows_H, rows_h, rows_D, part * 64, C, 64, WIDE)
        if not WIDE:
            hi = through_registers(hi)
        scores = dot(K, tl.trans(to_operand(hi, WIDE)), scores, WIDE)
        if not WIDE:
            scores = dot(K, tl.trans(lo), scores, WIDE)
    return scores


@triton.jit
def _from_end(
    k_ptr, start, end, Hk, hk, hi_ptr, lo_ptr, program, acc, D: tl.constexpr, columns: tl.constexpr,
    column: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, PIPELINE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """acc + K times a gradient [D, columns] that is kept as a pair, BLOCK columns from `column`.

    64 rows at a time: more would not fit into registers.
    """
    for part in tl.range(BD // 64, num_stages=PIPELINE, loop_unroll_factor=1 if PIPELINE > 1 else BD // 64):
        if PIPELINE == 1:
            tl.debug_barrier()
        K = to_operand(load_rows(k_ptr, start, end, Hk, hk, D, part * 64, C, 64), WIDE)
        hi, lo = load_matrix_operands(hi_ptr, lo_ptr, program, D, columns, part * 64, column, 64, BLOCK, WIDE)
        if not WIDE:
            hi = through_registers(hi)
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
    sum_uv_ptr, sum_uv_end_ptr,  # out: <u, v> but for the term with W_, and that term, [tokens, H] float32
    sum_pk_ptr,  # out: <p, k> but for the terms with S_kk_0 and G_, [tokens, H] float32
    chunk_ptr, scale, first_chunk, H, Hk, D: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr,
    SOLVE: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr,
    PIPELINE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    h, start, end = head_and_chunk(program, chunk_ptr, first_chunk, H)
    if start >= end:
        return
    hk, row, first = h // (H // Hk), program * C, program * 4
    G = log_decays(g_ptr, start, end, H, h, C)
    upper = tl.arange(0, C)[:, None] <= tl.arange(0, C)[None, :]
    both = both_masks(G, C)
    N = tl.where(upper, both, 0.0)
    beta, key_scale = key_weights(beta_ptr, key_scale_ptr, start, end, H, h, Hk, hk, C, HAS_BETA, NORMALIZE)
    query_scale = tl.full([C], 1.0, tl.float32)
    if NORMALIZE:
        query_scale = load_scalars(query_scale_ptr, start, end, H, h, C)
    K = to_operand(load_rows(k_ptr, start, end, Hk, hk, D, 0, C, BD), WIDE)
    zeros = tl.zeros([C, C], tl.float32)
    alpha = tl.full([C], 1.0, tl.float32)
    if HAS_ALPHA:
        alpha = load_scalars(alpha_ptr, start, end, H, h, C)

    keys_y = zeros
    if SOLVE:
        gram = dot(K, tl.trans(K), zeros, WIDE)
        # With m = max(i, j), N_{i,c} N_{j,c} is N_{m,c}^2 e^{G_m - G_i} e^{G_m - G_j}, and one exponent is 0.
        sum_N2_w = sums_of_later(load_scalars(w_ptr, start, end, H, h, C), 2.0, g_ptr, start, end, H, h, C)
        weighted_gram = gram * both * tl.where(upper, sum_N2_w[None, :], sum_N2_w[:, None])
        weighted_gram *= (-2.0 * beta * beta * key_scale * key_scale)[None, :]
        sum_pk = tl.sum(weighted_gram * gram, 1)
        store_matrix(scores_ptr, weighted_gram * key_scale[:, None], first + 2, C, C, 0, 0, C, C)
        x_scores = _scores(k_ptr, start, end, Hk, hk, x_hi_ptr, x_lo_ptr, start, end, H, h, D, D, C, BD,
                           PIPELINE, WIDE)  # fmt: skip
        keys_y = x_scores * alpha[None, :]
        x_scores = x_scores * -N
        store_matrix(scores_ptr, x_scores * key_scale[:, None], first + 1, C, C, 0, 0, C, C)
        z_scores = _scores(k_ptr, start, end, Hk, hk, z_hi_ptr, z_lo_ptr, row, row + C, 1, 0, BD, D, C, BD,
                           PIPELINE, WIDE)  # fmt: skip
        store_scalars(sum_pk_ptr, sum_pk + 2.0 * tl.sum(z_scores * x_scores, 1), start, end, H, h, C)
        z_scores = z_scores * -N * key_scale[:, None]
    query_weight = query_scale
    if HAS_ALPHA or not SOLVE:
        if SOLVE:
            query_weight = query_scale * (1.0 - alpha)
        Q = to_operand(load_rows(q_ptr, start, end, H, h, D, 0, C, BD), WIDE)
        keys_y += dot(K, tl.trans(Q), zeros, WIDE) * query_weight[None, :]
    values_dO = zeros
    for block in tl.static_range(BLOCKS):
        values = to_operand(load_rows(v_ptr, start, end, Hk, hk, V, block * BV, C, BV), WIDE)
        dO = to_operand(load_rows(do_ptr, start, end, H, h, V, block * BV, C, BV), WIDE)
        values_dO = dot(values, tl.trans(dO), values_dO, WIDE)
    values_dO = values_dO * N * scale
    if SOLVE:
        store_matrix(scores_ptr, values_dO * alpha[None, :] + z_scores, first, C, C, 0, 0, C, C)
    if HAS_ALPHA or not SOLVE:
        store_matrix(scores_ptr, values_dO * query_weight[None, :], first + 3, C, C, 0, 0, C, C)
    store_scalars(sum_uv_ptr, tl.sum(keys_y * values_dO, 1), start, end, H, h, C)
    masked_keys_y = to_operand(keys_y * N * scale, WIDE)

    to_end = tl.exp(last_of(G, C) - G)
    sum_uv_end = tl.zeros([C], tl.float32)
    for block in tl.static_range(BLOCKS):
        u = _from_end(k_ptr, start, end, Hk, hk, d_kv_hi_ptr, d_kv_lo_ptr, program, tl.zeros([C, BV], tl.float32),
                      D, V, block * BV, C, BD, BV, PIPELINE, WIDE) * to_end[:, None]  # fmt: skip
        values = load_rows(v_ptr, start, end, Hk, hk, V, block * BV, C, BV).to(tl.float32)
        sum_uv_end += tl.sum(u * values, 1)
        dO = to_operand(load_rows(do_ptr, start, end, H, h, V, block * BV, C, BV), WIDE)
        u = dot(masked_keys_y, dO, u, WIDE)
        store_rows(dv_ptr, u * (beta * beta * key_scale)[:, None], start, end, H, h, V, block * BV, C, BV)
    store_scalars(sum_uv_end_ptr, sum_uv_end, start, end, H, h, C)


@triton.jit(do_not_specialize=["first_chunk"])
def key_gradients(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, key_scale_ptr,
    x_ptr, z_ptr,  # hi, [tokens, H, D], [chunks, H, C, BD]
    sum_M_w_zeta_ptr, ydy_minus_zAx_ptr, sum_uv_ptr, sum_uv_end_ptr, sum_pk_ptr,  # [tokens, H] float32
    scores_ptr,  # [chunks, H, 4, C, C], from `value_gradients`
    kk_ptr, d_kk_hi_ptr, d_kk_lo_ptr, d_kv_hi_ptr, d_kv_lo_ptr,  # S_kk_0 (hi), G_, W_, [chunks, H, D, D | V]
    decayed_inner_ptr,  # [chunks, H, 2, D] float32, from `scan_gradients`
    dk_ptr, dg_ptr, dbeta_ptr,  # out: [tokens, H, D], [tokens, H] twice
    chunk_ptr, first_chunk, H, Hk, D: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr,
    SOLVE: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr,
    PIPELINE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    h, start, end = head_and_chunk(program, chunk_ptr, first_chunk, H)
    if start >= end:
        return
    hk, row, first = h // (H // Hk), program * C, program * 4
    G = log_decays(g_ptr, start, end, H, h, C)
    to_end = tl.exp(last_of(G, C) - G)
    beta, key_scale = key_weights(beta_ptr, key_scale_ptr, start, end, H, h, Hk, hk, C, HAS_BETA, NORMALIZE)
    dk = tl.zeros([C, BD], tl.float32)
    sum_pk = tl.zeros([C], tl.float32)
    sum_pk_end = tl.zeros([C], tl.float32)
    # What comes from the chunk's end: K G_ and V W_^T, each large where no key is, nearly cancel in their sum.
    if SOLVE:
        dk = _from_end(k_ptr, start, end, Hk, hk, d_kk_hi_ptr, d_kk_lo_ptr, program, dk, D, D, 0, C, BD, BD,
                       PIPELINE, WIDE)  # fmt: skip
        sum_pk_end = (
            tl.sum(dk * load_rows(k_ptr, start, end, Hk, hk, D, 0, C, BD).to(tl.float32), 1) * 2.0 * to_end
        )
        dk = dk * (2.0 * key_scale)[:, None]
    for block in tl.static_range(BLOCKS):
        for part in tl.range(BV // 64, num_stages=PIPELINE):
            if PIPELINE == 1:
                tl.debug_barrier()
            column = block * BV + part * 64
            values = to_operand(load_rows(v_ptr, start, end, Hk, hk, V, column, C, 64), WIDE)
            W, W_lo = load_matrix_operands(d_kv_hi_ptr, d_kv_lo_ptr, program, D, V, 0, column, BD, 64, WIDE)
            if not WIDE:
                W = through_registers(W)
                dk = dot(values, tl.trans(W_lo), dk, WIDE)
            dk = dot(values, tl.trans(W), dk, WIDE)
    dk = dk * to_end[:, None]
    if SOLVE:
        S_keys = tl.zeros([C, BD], tl.float32)
        for part in tl.range(BD // 64, num_stages=PIPELINE, loop_unroll_factor=1 if PIPELINE > 1 else BD // 64):
            if PIPELINE == 1:
                tl.debug_barrier()
            some_K = to_operand(load_rows(k_ptr, start, end, Hk, hk, D, part * 64, C, 64), WIDE)
            S_keys = dot(some_K, load_matrix(kk_ptr, program, D, D, part * 64, 0, 64, BD), S_keys, WIDE)
        S_keys = S_keys * (-2.0 * load_scalars(sum_M_w_zeta_ptr, start, end, H, h, C))[:, None]
        sum_pk = load_scalars(sum_pk_ptr, start, end, H, h, C) + tl.sum(
            S_keys * load_rows(k_ptr, start, end, Hk, hk, D, 0, C, BD).to(tl.float32), 1
        )
        dk += S_keys * key_scale[:, None]
        for of_z in tl.range(2, num_stages=PIPELINE):
            if PIPELINE == 1:
                tl.debug_barrier()
            weights = to_operand(load_matrix(scores_ptr, first + of_z, C, C, 0, 0, C, C), WIDE)
            rows = load_rows(
                z_ptr if of_z == 1 else x_ptr, tl.where(of_z == 1, row, start), tl.where(of_z == 1, row + C, end),
                tl.where(of_z == 1, 1, H), tl.where(of_z == 1, 0, h), tl.where(of_z == 1, BD, D), 0, C, BD,
            )  # fmt: skip
            dk = dot(weights, to_operand(rows, WIDE), dk, WIDE)
        tl.debug_barrier()
        weights = to_operand(load_matrix(scores_ptr, first + 2, C, C, 0, 0, C, C), WIDE)
        K = to_operand(load_rows(k_ptr, start, end, Hk, hk, D, 0, C, BD), WIDE)
        dk = dot(weights, K, dk, WIDE)
    if HAS_ALPHA or not SOLVE:
        tl.debug_barrier()
        Q = to_operand(load_rows(q_ptr, start, end, H, h, D, 0, C, BD), WIDE)
        weights = to_operand(load_matrix(scores_ptr, first + 3, C, C, 0, 0, C, C), WIDE)
        dk = dot(weights, Q, dk, WIDE)
    dk = dk * (beta * beta)[:, None]
    if NORMALIZE:
        k = load_rows(k_ptr, start, end, Hk, hk, D, 0, C, BD).to(tl.float32)
        norm = tl.sqrt(tl.sum(k * k, 1))
        projection = tl.where(norm > 0.0, tl.sum(k * dk, 1) * key_scale / norm, 0.0)
        dk = (dk - k * projection[:, None]) * key_scale[:, None]
    store_rows(dk_ptr, dk, start, end, H, h, D, 0, C, BD)
    sum_uv = load_scalars(sum_uv_ptr, start, end, H, h, C)
    sum_uv_end = load_scalars(sum_uv_end_ptr, start, end, H, h, C)
    weight = beta * beta * key_scale
    from_later = load_scalars(ydy_minus_zAx_ptr, start, end, H, h, C) - weight * (
        sum_uv + 0.5 * key_scale * sum_pk
    )
    from_earlier = weight * (sum_uv_end + 0.5 * key_scale * sum_pk_end)
    d = tl.arange(0, BD)
    decayed_inner = tl.load(decayed_inner_ptr + program * 2 * D + D + d, mask=d < D, other=0.0)
    if SOLVE:
        decayed_inner += tl.load(decayed_inner_ptr + program * 2 * D + d, mask=d < D, other=0.0)
    dg = (
        tl.cumsum(from_later, 0, reverse=True)
        + tl.cumsum(from_earlier, 0)
        - from_earlier
        + tl.sum(decayed_inner, 0)
    )
    store_scalars(dg_ptr, dg, start, end, H, h, C)
    if HAS_BETA:
        dbeta = beta * key_scale * (key_scale * (sum_pk + sum_pk_end) + 2.0 * (sum_uv + sum_uv_end))
        store_scalars(dbeta_ptr, dbeta, start, end, H, h, C)


def launch_value_gradients(
    call: Call, part: Part, work: BackwardWorkspace, *, scales: Scales, do: Tensor, dv: Tensor
) -> None:
    """dv, and for `key_gradients` scores, sum_uv, sum_uv_end and sum_pk, from x, z, w and d_states.kv."""
    x, z, d_kv = work.x, work.z, work.d_states.kv
    launch(value_gradients, part.programs,
        q_ptr=call.q, alpha_ptr=call.alpha, query_scale_ptr=scales.query,
        x_hi_ptr=x.hi, x_lo_ptr=x.lo, z_hi_ptr=z.hi, z_lo_ptr=z.lo, do_ptr=do, w_ptr=work.w,
        d_kv_hi_ptr=d_kv.hi, d_kv_lo_ptr=d_kv.lo, dv_ptr=dv, scores_ptr=work.scores,
        sum_uv_ptr=work.sum_uv, sum_uv_end_ptr=work.sum_uv_end, sum_pk_ptr=work.sum_pk,
        scale=call.scale, SOLVE=call.solve, HAS_ALPHA=call.has_alpha,
        PIPELINE=call.config.local_pipeline,
        **keys_and_values(call, part, scales), **call.config.local,
    )  # fmt: skip


def launch_key_gradients(
    call: Call, part: Part, work: BackwardWorkspace, *, scales: Scales, dk: Tensor, dg: Tensor,
    dbeta: Tensor | None,
) -> None:  # fmt: skip
    """dk, dg and dbeta, from x, z, states.kk, d_states, decayed_inner and the sums of all stages before."""
    d_kk, d_kv = work.d_states
    launch(key_gradients, part.programs,
        q_ptr=call.q, x_ptr=work.x.hi, z_ptr=work.z.hi,
        sum_M_w_zeta_ptr=work.sum_M_w_zeta, ydy_minus_zAx_ptr=work.ydy_minus_zAx,
        sum_uv_ptr=work.sum_uv, sum_uv_end_ptr=work.sum_uv_end, sum_pk_ptr=work.sum_pk, scores_ptr=work.scores,
        kk_ptr=work.states.kk.hi, d_kk_hi_ptr=d_kk.hi, d_kk_lo_ptr=d_kk.lo,
        d_kv_hi_ptr=d_kv.hi, d_kv_lo_ptr=d_kv.lo, decayed_inner_ptr=work.decayed_inner,
        dk_ptr=dk, dg_ptr=dg, dbeta_ptr=dbeta, SOLVE=call.solve, HAS_ALPHA=call.has_alpha,
        PIPELINE=call.config.local_pipeline,
        **keys_and_values(call, part, scales), **call.config.local,
    )  # fmt: skip
