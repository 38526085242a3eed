"""What is read from the states, and what the reading's gradient asks of the solve.

Forward (paper, sections 4.1 and 4.2), with M_{c,j} = e^{G_c - G_j} for j <= c and zeta_c = e^{G_c}:

    y = r_q q + alpha (x - r_q q)            r_q = 1 / (||q|| + 1e-6) if normalised, else 1
    o = scale ((zeta o Y) S_kv_0 + ((Y K^T) o M o beta^2 r_k) V)

Backward (section 4.3), dy and then, with z = alpha A^{-1} dy from the solve:

    dy = scale ((zeta o dO) S_kv_0^T + ((dO V^T) o M o beta^2 r_k) K)
    dalpha = <x - r_q q, dy>       dq = (1 - alpha) dy + z, taken through the normalisation
    w = a <z, x> / ||S||           ydy_minus_zAx = <y, dy> - <A z, x>, a term of dg

<A z, x>, the solve takes from one more product: <z, r_q q> departs from it by the truncation of x, and where the
sum of such terms nearly cancels, as in the gradient of A_log, that shows.

x and z are pairs hi + lo, dy is float32. One program works on one chunk of one head.

Legend: C tokens of a chunk; H query heads, Hk key/value heads; D key dim, V value dim; BD, BV blocks of them.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..call import BackwardWorkspace, Call, Pair, Part, Scales, StatePairs, keys_and_values
from ..launch import launch
from .arithmetic import dot, fine_dot, pair_dot, through_registers, to_operand
from .common import (
    NORM_FLOOR,
    head_and_chunk,
    key_weights,
    load_matrix_operands,
    load_pairs,
    load_rows,
    load_scalars,
    log_decays,
    past_mask,
    store_rows,
    store_scalars,
)
from .state_gradients import blend


@triton.jit(do_not_specialize=["first_chunk"])
def read_states(
    q_ptr, k_ptr, v_ptr, g_ptr, alpha_ptr, beta_ptr, query_scale_ptr, key_scale_ptr,
    x_hi_ptr, x_lo_ptr,  # [tokens, H, D]
    kv_hi_ptr, kv_lo_ptr,  # first states, [chunks, H, D, V]
    o_ptr,  # out: [tokens, H, V]
    chunk_ptr, scale, first_chunk, H, Hk, D: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr,
    SOLVE: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr,
    PIPELINE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    h, start, end = head_and_chunk(program, chunk_ptr, first_chunk, H)
    if start >= end:
        return
    hk = h // (H // Hk)
    G = log_decays(g_ptr, start, end, H, h, C)
    beta, key_scale = key_weights(beta_ptr, key_scale_ptr, start, end, H, h, Hk, hk, C, HAS_BETA, NORMALIZE)
    y = blend(q_ptr, x_hi_ptr, x_lo_ptr, alpha_ptr, query_scale_ptr, start, end, H, h, D,
              C, BD, SOLVE, HAS_ALPHA, NORMALIZE, WIDE) * scale  # fmt: skip
    K = to_operand(load_rows(k_ptr, start, end, Hk, hk, D, 0, C, BD), WIDE)
    scores = fine_dot(y, tl.trans(K), tl.zeros([C, C], tl.float32), WIDE)
    scores = scores * past_mask(G, C) * (beta * beta * key_scale)[None, :]
    y = y * tl.exp(G)[:, None]
    for block in tl.range(BLOCKS, num_stages=PIPELINE):
        S_hi, S_lo = load_matrix_operands(kv_hi_ptr, kv_lo_ptr, program, D, V, 0, block * BV, BD, BV, WIDE)
        if not WIDE:
            S_hi = through_registers(S_hi)
        o = pair_dot(y, S_hi, S_lo, tl.zeros([C, BV], tl.float32), WIDE)
        values = to_operand(load_rows(v_ptr, start, end, Hk, hk, V, block * BV, C, BV), WIDE)
        o = fine_dot(scores, values, o, WIDE)
        store_rows(o_ptr, o, start, end, H, h, V, block * BV, C, BV)


@triton.jit(do_not_specialize=["first_chunk"])
def read_gradients(
    k_ptr, v_ptr, g_ptr, beta_ptr, key_scale_ptr, do_ptr,
    kv_hi_ptr, kv_lo_ptr,  # first states, [chunks, H, D, V]
    dy_ptr,  # out: [chunks, H, C, BD] float32
    chunk_ptr, scale, first_chunk, H, Hk, D: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr,
    HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr, PIPELINE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    h, start, end = head_and_chunk(program, chunk_ptr, first_chunk, H)
    if start >= end:
        return
    hk = h // (H // Hk)
    G = log_decays(g_ptr, start, end, H, h, C)
    scaled_zeta = scale * tl.exp(G)
    beta, key_scale = key_weights(beta_ptr, key_scale_ptr, start, end, H, h, Hk, hk, C, HAS_BETA, NORMALIZE)
    dy = tl.zeros([C, BD], tl.float32)
    scores = tl.zeros([C, C], tl.float32)
    for block in tl.range(BLOCKS, num_stages=PIPELINE):
        dO = load_rows(do_ptr, start, end, H, h, V, block * BV, C, BV)
        values = to_operand(load_rows(v_ptr, start, end, Hk, hk, V, block * BV, C, BV), WIDE)
        scores = dot(to_operand(dO, WIDE), tl.trans(values), scores, WIDE)
        S_hi, S_lo = load_matrix_operands(kv_hi_ptr, kv_lo_ptr, program, D, V, 0, block * BV, BD, BV, WIDE)
        if not WIDE:
            S_hi = through_registers(S_hi)
        dy = pair_dot(dO.to(tl.float32) * scaled_zeta[:, None], tl.trans(S_hi), tl.trans(S_lo), dy, WIDE)
    scores = scores * past_mask(G, C) * (scale * beta * beta * key_scale)[None, :]
    K = to_operand(load_rows(k_ptr, start, end, Hk, hk, D, 0, C, BD), WIDE)
    dy = fine_dot(scores, K, dy, WIDE)
    row = program * C
    store_rows(dy_ptr, dy, row, row + C, 1, 0, BD, 0, C, BD)


@triton.jit(do_not_specialize=["first_chunk"])
def query_gradients(
    q_ptr, alpha_ptr, query_scale_ptr, x_hi_ptr, x_lo_ptr, norm_ptr,  # [tokens, H, D], [tokens, H]
    dy_ptr, z_hi_ptr, z_lo_ptr,  # [chunks, H, C, BD], dy float32
    inner_zAx_ptr,  # <A z, x>, [tokens, H] float32
    dq_ptr, dalpha_ptr, w_ptr, ydy_minus_zAx_ptr,  # out: [tokens, H, D], [tokens, H]
    chunk_ptr, ridge_ratio, first_chunk, H, D: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
    SOLVE: tl.constexpr, HAS_ALPHA: tl.constexpr, NORMALIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program works on ROWS rows of a chunk: they have nothing to do with each other."""
    first_row = tl.program_id(0) % (C // ROWS) * ROWS
    program = (tl.program_id(0) // (C // ROWS)).to(tl.int64)
    h, start, end = head_and_chunk(program, chunk_ptr, first_chunk, H)
    start += first_row
    if start >= end:
        return
    row = program * C + first_row
    q = load_rows(q_ptr, start, end, H, h, D, 0, ROWS, BD).to(tl.float32)
    query_scale = tl.full([ROWS], 1.0, tl.float32)
    if NORMALIZE:
        query_scale = load_scalars(query_scale_ptr, start, end, H, h, ROWS)
        q = q * query_scale[:, None]
    dy = load_rows(dy_ptr, row, row + ROWS, 1, 0, BD, 0, ROWS, BD)
    ydy_minus_zAx = tl.sum(q * dy, 1)
    dq = dy
    if SOLVE:
        x = load_pairs(x_hi_ptr, x_lo_ptr, start, end, H, h, D, 0, ROWS, BD, WIDE)
        z = load_pairs(z_hi_ptr, z_lo_ptr, row, row + ROWS, 1, 0, BD, 0, ROWS, BD, WIDE)
        dalpha = tl.sum((x - q) * dy, 1)
        dq = z
        if HAS_ALPHA:
            store_scalars(dalpha_ptr, dalpha, start, end, H, h, ROWS)
            alpha = load_scalars(alpha_ptr, start, end, H, h, ROWS)
            dalpha = alpha * dalpha
            dq = (1.0 - alpha)[:, None] * dy + z
        norm = load_scalars(norm_ptr, start, end, H, h, ROWS)
        ridge_zx = ridge_ratio * tl.sum(z * x, 1)
        above_floor = norm > NORM_FLOOR
        store_scalars(w_ptr, tl.where(above_floor, ridge_zx / norm, 0.0), start, end, H, h, ROWS)
        inner_zAx = load_scalars(inner_zAx_ptr, start, end, H, h, ROWS)
        # Below the floor the ridge does not follow the state: no gradient of the decays passes through it.
        ydy_minus_zAx += dalpha - inner_zAx + tl.where(above_floor, 0.0, ridge_zx * norm)
    if NORMALIZE:
        norm = tl.sqrt(tl.sum(q * q, 1)) / query_scale
        projection = tl.where(norm > 0.0, tl.sum(q * dq, 1) / (norm * query_scale), 0.0)
        dq = (dq - q * projection[:, None]) * query_scale[:, None]
    store_rows(dq_ptr, dq, start, end, H, h, D, 0, ROWS, BD)
    store_scalars(ydy_minus_zAx_ptr, ydy_minus_zAx, start, end, H, h, ROWS)


def launch_read_states(call: Call, part: Part, *, scales: Scales, x: Pair, states: StatePairs, o: Tensor) -> None:
    launch(read_states, part.programs,
        q_ptr=call.q, alpha_ptr=call.alpha, query_scale_ptr=scales.query, x_hi_ptr=x.hi, x_lo_ptr=x.lo,
        kv_hi_ptr=states.kv.hi, kv_lo_ptr=states.kv.lo, o_ptr=o,
        scale=call.scale, SOLVE=call.solve, HAS_ALPHA=call.has_alpha,
        PIPELINE=call.config.read_pipeline,
        **keys_and_values(call, part, scales, call.config.o_columns), **call.config.read,
    )  # fmt: skip


def launch_read_gradients(call: Call, part: Part, work: BackwardWorkspace, *, scales: Scales, do: Tensor) -> None:
    """dy, from states.kv and do."""
    kv = work.states.kv
    launch(read_gradients, part.programs,
        do_ptr=do, kv_hi_ptr=kv.hi, kv_lo_ptr=kv.lo, dy_ptr=work.dy, scale=call.scale,
        PIPELINE=call.config.read_pipeline,
        **keys_and_values(call, part, scales, call.config.dy_columns), **call.config.read,
    )  # fmt: skip


def launch_query_gradients(
    call: Call, part: Part, work: BackwardWorkspace, *, scales: Scales, dq: Tensor, dalpha: Tensor | None
) -> None:
    """dq, dalpha, w and ydy_minus_zAx, from x, norm, dy, z and inner_zAx."""
    x, z, rows = work.x, work.z, call.config.query_rows
    launch(query_gradients, part.programs * (call.C // rows),
        q_ptr=call.q, alpha_ptr=call.alpha, query_scale_ptr=scales.query,
        x_hi_ptr=x.hi, x_lo_ptr=x.lo, norm_ptr=work.norm, dy_ptr=work.dy, z_hi_ptr=z.hi, z_lo_ptr=z.lo,
        inner_zAx_ptr=work.inner_zAx, dq_ptr=dq, dalpha_ptr=dalpha, w_ptr=work.w,
        ydy_minus_zAx_ptr=work.ydy_minus_zAx,
        chunk_ptr=call.chunks, ridge_ratio=call.ridge_ratio, first_chunk=part.first, H=call.H, D=call.D,
        C=call.C, BD=call.BD, ROWS=rows, SOLVE=call.solve, HAS_ALPHA=call.has_alpha,
        NORMALIZE=call.normalize, WIDE=call.wide, **call.config.rowwise,
    )  # fmt: skip
