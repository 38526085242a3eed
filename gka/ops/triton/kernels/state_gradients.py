"""The gradients of both states, backwards through the chunks (paper, section 4.3; zeta_c = e^{G_c}).

With G_ and W_ the gradients of S_kk and S_kv at a chunk's end, and S_0 its first S_kk:

    G_ <- decay G_ - ((zeta o Z)^T X + (zeta o X)^T Z) / 2 - sum_w_zeta2 S_0 - K^T diag(sum_M_w_zeta beta^2 r^2) K
    W_ <- decay W_ + scale (zeta o Y)^T dO
    sum_M_w_zeta_j = sum_{c >= j} M_{c,j} w_c zeta_c              sum_w_zeta2 = sum_c w_c zeta_c^2
    decayed_inner = decay <G_, S_kk_0> and decay <W_, S_kv_0>, row by row: terms of dg

Scanned like the states a step would be six tiles, so all chunks' increments are formed first, side by side, and
then summed up in place.

Legend: N sequences, NT chunks, H query heads, Hk key/value heads, D key dim, V value dim; BD, BV blocks of them;
BM rows of a tile; c, j tokens of a chunk; M, r and w as in `readout`.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..call import BackwardWorkspace, Call, Edges, KeyWeights, Part, Scales
from ..launch import launch, or_stand_in
from .arithmetic import dot, joined, split, to_operand
from .common import (
    head_and_chunk,
    key_weights,
    load_matrix,
    load_operands,
    load_pairs,
    load_rows,
    load_scalars,
    load_transposed,
    log_decays,
    store_matrix,
    store_matrix_pair,
    store_scalars,
    sums_of_later,
)


@triton.jit
def _is_elsewhere(begin, end, first, last):
    """Whether a sequence has no chunk in this call; one without any chunk belongs to the first call."""
    return tl.where(begin == end, first > 0, (begin >= last) | (end <= first))


@triton.jit
def _cross(left_hi, left_lo, right_hi, right_lo, acc, WIDE: tl.constexpr):
    """acc + left^T right of pairs."""
    acc = dot(tl.trans(left_hi), right_hi, acc, WIDE)
    if not WIDE:
        acc = dot(tl.trans(left_lo), right_hi, acc, WIDE)
        acc = dot(tl.trans(left_hi), right_lo, acc, WIDE)
    return acc


@triton.jit(do_not_specialize=["first_chunk"])
def increments_kk(
    k_ptr, x_hi_ptr, x_lo_ptr, z_hi_ptr, z_lo_ptr,  # [tokens, Hk, D], [tokens, H, D], [chunks, H, C, BD]
    g_ptr, beta_ptr, key_scale_ptr, w_ptr,  # [tokens, H], key_scale [tokens, Hk]
    d_hi_ptr, d_lo_ptr,  # out: [chunks, H, D, D]
    sum_M_w_zeta_ptr, sum_w_zeta2_ptr,  # out: [tokens, H], [chunks, H] float32
    chunk_ptr, first_chunk, H, Hk, D: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """What every chunk adds to G_ on the way back but for sum_w_zeta2 S_0, BD rows and HALF columns a program."""
    program = tl.program_id(0).to(tl.int64)
    half, program = (program % (BD // HALF)).to(tl.int32), program // (BD // HALF)
    h, start, stop = head_and_chunk(program, chunk_ptr, first_chunk, H)
    if start >= stop:
        return
    hk = h // (H // Hk)
    column = half * HALF
    G = log_decays(g_ptr, start, stop, H, h, C)
    half_zeta = -0.5 * tl.exp(G)
    w_zeta = load_scalars(w_ptr, start, stop, H, h, C) * tl.exp(G)
    sum_M_w_zeta = sums_of_later(w_zeta, 1.0, g_ptr, start, stop, H, h, C)
    if half == 0:
        store_scalars(sum_M_w_zeta_ptr, sum_M_w_zeta, start, stop, H, h, C)
        tl.store(sum_w_zeta2_ptr + program, tl.sum(w_zeta * tl.exp(G), 0))
    beta, key_scale = key_weights(beta_ptr, key_scale_ptr, start, stop, H, h, Hk, hk, C, HAS_BETA, NORMALIZE)
    key_weight = sum_M_w_zeta * beta * beta * key_scale * key_scale
    row = program * C
    dS = tl.zeros([BD, HALF], tl.float32)
    z_hi, z_lo = load_operands(z_hi_ptr, z_lo_ptr, row, row + C, 1, 0, BD, 0, C, BD, WIDE)
    x = load_pairs(x_hi_ptr, x_lo_ptr, start, stop, H, h, D, 0, C, BD, WIDE)
    x_hi, x_lo = split(x * half_zeta[:, None], WIDE)
    if HALF == BD:
        dS = _cross(z_hi, z_lo, x_hi, x_lo, dS, WIDE)
        dS = _cross(x_hi, x_lo, z_hi, z_lo, dS, WIDE)
    else:
        right = load_pairs(x_hi_ptr, x_lo_ptr, start, stop, H, h, D, column, C, HALF, WIDE)
        right_hi, right_lo = split(right * half_zeta[:, None], WIDE)
        dS = _cross(z_hi, z_lo, right_hi, right_lo, dS, WIDE)
        right_hi, right_lo = load_operands(z_hi_ptr, z_lo_ptr, row, row + C, 1, 0, BD, column, C, HALF, WIDE)
        dS = _cross(x_hi, x_lo, right_hi, right_lo, dS, WIDE)
    left = load_rows(k_ptr, start, stop, Hk, hk, D, 0, C, BD)
    right = load_rows(k_ptr, start, stop, Hk, hk, D, column, C, HALF).to(tl.float32) * -key_weight[:, None]
    dS = dot(tl.trans(to_operand(left, WIDE)), to_operand(right, WIDE), dS, WIDE)
    store_matrix_pair(d_hi_ptr, d_lo_ptr, dS, program, D, D, 0, column, BD, HALF, WIDE)


@triton.jit(do_not_specialize=["first_chunk"])
def increments_kv(
    q_ptr, x_hi_ptr, x_lo_ptr, do_ptr,  # [tokens, H, D], [tokens, H, V]
    g_ptr, alpha_ptr, query_scale_ptr,  # [tokens, H]
    d_hi_ptr, d_lo_ptr,  # out: [chunks, H, D, V]
    chunk_ptr, scale, first_chunk, H, D: tl.constexpr, V: tl.constexpr, blocks,
    C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    SOLVE: tl.constexpr, HAS_ALPHA: tl.constexpr, NORMALIZE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """What every chunk adds to W_ on the way back, one of `blocks` blocks of BV columns a program."""
    program = tl.program_id(0).to(tl.int64)
    column, program = (program % blocks).to(tl.int32) * BV, program // blocks
    h, start, stop = head_and_chunk(program, chunk_ptr, first_chunk, H)
    if start >= stop:
        return
    zeta = tl.exp(log_decays(g_ptr, start, stop, H, h, C))
    y = blend(q_ptr, x_hi_ptr, x_lo_ptr, alpha_ptr, query_scale_ptr, start, stop, H, h, D,
              C, BD, SOLVE, HAS_ALPHA, NORMALIZE, WIDE)  # fmt: skip
    hi, lo = split(y * (scale * zeta)[:, None], WIDE)
    dO = to_operand(load_rows(do_ptr, start, stop, H, h, V, column, C, BV), WIDE)
    dS = dot(tl.trans(hi), dO, tl.zeros([BD, BV], tl.float32), WIDE)
    if not WIDE:
        dS = dot(tl.trans(lo), dO, dS, WIDE)
    store_matrix_pair(d_hi_ptr, d_lo_ptr, dS, program, D, V, 0, column, BD, BV, WIDE)


@triton.jit
def blend(
    q_ptr, x_hi_ptr, x_lo_ptr, alpha_ptr, query_scale_ptr, start, stop, H, h, D,
    C: tl.constexpr, BD: tl.constexpr, SOLVE: tl.constexpr, HAS_ALPHA: tl.constexpr, NORMALIZE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """y = q + alpha (x - q) [C, BD] float32, with q = r_q times the query as it came."""
    if SOLVE and not HAS_ALPHA:
        return load_pairs(x_hi_ptr, x_lo_ptr, start, stop, H, h, D, 0, C, BD, WIDE)
    else:
        y = load_rows(q_ptr, start, stop, H, h, D, 0, C, BD).to(tl.float32)
        if NORMALIZE:
            y = y * load_scalars(query_scale_ptr, start, stop, H, h, C)[:, None]
        if SOLVE:
            x = load_pairs(x_hi_ptr, x_lo_ptr, start, stop, H, h, D, 0, C, BD, WIDE)
            y += load_scalars(alpha_ptr, start, stop, H, h, C)[:, None] * (x - y)
        return y


@triton.jit
def _pair(hi_ptr, lo_ptr, index, rows, columns, row, BM: tl.constexpr, BV: tl.constexpr, WIDE: tl.constexpr):
    """hi and lo8 [BM, BV] of a matrix that is kept as a pair, as they are; lo8 is hi if WIDE."""
    hi = load_matrix(hi_ptr, index, rows, columns, row, 0, BM, BV)
    lo8 = hi
    if not WIDE:
        lo8 = load_matrix(lo_ptr, index, rows, columns, row, 0, BM, BV)
    return hi, lo8


@triton.jit(do_not_specialize=["first", "last"])
def scan_gradients(
    decay_ptr, sum_w_zeta2_ptr,  # [NT, H] float32, [chunks, H] float32
    kk_ptr, kv_ptr,  # first states of the chunks (hi), [chunks, H, D, D], [chunks, H, D, V]
    d_final_kk_ptr, d_final_kv_ptr, d_initial_kk_ptr, d_initial_kv_ptr,  # [N, H, D, D], [N, H, D, V] float32
    edge_in_kk_ptr, edge_in_kv_ptr, edge_out_kk_ptr, edge_out_kv_ptr,  # [H, D, D], [H, D, V] float32
    d_kk_hi_ptr, d_kk_lo_ptr, d_kv_hi_ptr, d_kv_lo_ptr,  # increments, replaced by gradients at the chunks' ends
    decayed_inner_ptr,  # out: [chunks, H, 2, D] float32, of S_kk and of S_kv
    offset_ptr,  # [N + 1] int64
    first, last, H, D: tl.constexpr, V: tl.constexpr, tiles_kk, tiles_kv,
    BM: tl.constexpr, BV: tl.constexpr, SOLVE: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Tiles are whole rows, BM at a time: first those of S_kk, then those of S_kv."""
    program = tl.program_id(0)
    tiles = tiles_kk + tiles_kv
    tile, h, n = program % tiles, (program // tiles) % H, program // (tiles * H)
    begin, end = tl.load(offset_ptr + n), tl.load(offset_ptr + n + 1)
    if _is_elsewhere(begin, end, first, last):
        return
    is_kk = tile < tiles_kk
    row = tl.where(is_kk, tile, tile - tiles_kk) * BM
    width = tl.where(is_kk, D, V)
    state_ptr = kk_ptr if is_kk else kv_ptr
    d_hi_ptr = d_kk_hi_ptr if is_kk else d_kv_hi_ptr
    d_lo_ptr = d_kk_lo_ptr if is_kk else d_kv_lo_ptr
    rows = row + tl.arange(0, BM)
    sums_ptr = decayed_inner_ptr + tl.where(is_kk, 0, D) + rows

    dS = tl.zeros([BM, BV], tl.float32)
    if (end > last) & (begin < end):
        edge_ptr = edge_in_kk_ptr if is_kk else edge_in_kv_ptr
        dS = load_matrix(edge_ptr, h, D, width, row, 0, BM, BV)
    elif HAS_FINAL:
        d_final_ptr = d_final_kk_ptr if is_kk else d_final_kv_ptr
        dS = load_matrix(d_final_ptr, n * H + h, D, width, row, 0, BM, BV)
        if is_kk:
            dS = 0.5 * (dS + load_transposed(d_final_ptr, n * H + h, D, D, 0, row, BV, BM))

    stop_chunk = tl.minimum(end, last)
    steps = stop_chunk - tl.maximum(begin, first)
    if steps > 0:
        index = (stop_chunk - 1 - first) * H + h
        added_hi, added_lo = _pair(d_hi_ptr, d_lo_ptr, index, D, width, row, BM, BV, WIDE)
        S = load_matrix(state_ptr, index, D, width, row, 0, BM, BV)
        decay = tl.load(decay_ptr + (stop_chunk - 1) * H + h)
        for step in range(0, steps):
            chunk = stop_chunk - 1 - step
            index = (chunk - first) * H + h
            before = tl.where(step + 1 < steps, index - H, index)
            next_hi, next_lo = _pair(d_hi_ptr, d_lo_ptr, before, D, width, row, BM, BV, WIDE)
            next_S = load_matrix(state_ptr, before, D, width, row, 0, BM, BV)
            next_decay = tl.load(decay_ptr + tl.where(step + 1 < steps, chunk - 1, chunk) * H + h)
            store_matrix_pair(d_hi_ptr, d_lo_ptr, dS, index, D, width, row, 0, BM, BV, WIDE)
            decayed, first_state = dS * decay, S.to(tl.float32)
            tl.store(sums_ptr + index * 2 * D, tl.sum(decayed * first_state, 1), mask=rows < D)
            dS = decayed + (added_hi if WIDE else joined(added_hi, added_lo))
            if SOLVE:
                dS -= tl.load(sum_w_zeta2_ptr + index, mask=is_kk, other=0.0) * first_state
            added_hi, added_lo, S, decay = next_hi, next_lo, next_S, next_decay

    if begin < first:
        edge_ptr = edge_out_kk_ptr if is_kk else edge_out_kv_ptr
        store_matrix(edge_ptr, dS, h, D, width, row, 0, BM, BV)
    elif HAS_INITIAL:
        d_initial_ptr = d_initial_kk_ptr if is_kk else d_initial_kv_ptr
        store_matrix(d_initial_ptr, dS, n * H + h, D, width, row, 0, BM, BV)


def launch_increments_kk(call: Call, part: Part, work: BackwardWorkspace, *, scales: Scales) -> None:
    """d_states.kk, sum_M_w_zeta and sum_w_zeta2, from x, z and w."""
    x, z, half = work.x, work.z, call.config.half
    launch(increments_kk, part.programs * (call.BD // half),
        k_ptr=call.k, x_hi_ptr=x.hi, x_lo_ptr=x.lo, z_hi_ptr=z.hi, z_lo_ptr=z.lo,
        g_ptr=call.g, beta_ptr=call.beta, key_scale_ptr=scales.key, w_ptr=work.w,
        d_hi_ptr=work.d_states.kk.hi, d_lo_ptr=work.d_states.kk.lo,
        sum_M_w_zeta_ptr=work.sum_M_w_zeta, sum_w_zeta2_ptr=work.sum_w_zeta2,
        chunk_ptr=call.chunks, first_chunk=part.first, H=call.H, Hk=call.Hk, D=call.D,
        C=call.C, BD=call.BD, HALF=half, HAS_BETA=call.has_beta, NORMALIZE=call.normalize, WIDE=call.wide,
        **call.config.increments_kk,
    )  # fmt: skip


def launch_increments_kv(call: Call, part: Part, work: BackwardWorkspace, *, scales: Scales, do: Tensor) -> None:
    """d_states.kv, from x and do."""
    launch(increments_kv, part.programs * call.blocks,
        q_ptr=call.q, x_hi_ptr=work.x.hi, x_lo_ptr=work.x.lo, do_ptr=do,
        g_ptr=call.g, alpha_ptr=call.alpha, query_scale_ptr=scales.query,
        d_hi_ptr=work.d_states.kv.hi, d_lo_ptr=work.d_states.kv.lo, chunk_ptr=call.chunks,
        scale=call.scale, first_chunk=part.first, H=call.H, D=call.D, V=call.V, blocks=call.blocks,
        C=call.C, BD=call.BD, BV=call.BV, SOLVE=call.solve, HAS_ALPHA=call.has_alpha,
        NORMALIZE=call.normalize, WIDE=call.wide, **call.config.increments,
    )  # fmt: skip


def _one_of_two(edges: Edges, number: int) -> Edges:
    kk, kv = edges
    return Edges(None if kk is None else kk[number % 2], None if kv is None else kv[number % 2])


def launch_scan_gradients(
    call: Call, part: Part, work: BackwardWorkspace, *, weights: KeyWeights, d_final: Edges, d_initial: Edges
) -> None:
    """d_states become gradients at the chunks' ends, and decayed_inner; at the sequences' begins d_initial, from
    d_final, the gradients of the final states. Of the two d_edges a part reads the one that the part after it
    wrote, and writes the other."""
    states, d_states, rows = work.states, work.d_states, call.config.rows
    tiles_kk, tiles_kv = -(-call.D // rows) if call.solve else 0, -(-call.D // rows)
    into, out = _one_of_two(work.d_edges, part.number + 1), _one_of_two(work.d_edges, part.number)
    launch(scan_gradients, (tiles_kk + tiles_kv) * call.H * call.N,
        decay_ptr=weights.decay, sum_w_zeta2_ptr=work.sum_w_zeta2, kk_ptr=states.kk.hi, kv_ptr=states.kv.hi,
        d_final_kk_ptr=or_stand_in(d_final.kk, d_final.kv), d_final_kv_ptr=d_final.kv,
        d_initial_kk_ptr=or_stand_in(d_initial.kk, d_initial.kv), d_initial_kv_ptr=d_initial.kv,
        edge_in_kk_ptr=or_stand_in(into.kk, into.kv), edge_in_kv_ptr=into.kv,
        edge_out_kk_ptr=or_stand_in(out.kk, out.kv), edge_out_kv_ptr=out.kv,
        d_kk_hi_ptr=d_states.kk.hi, d_kk_lo_ptr=d_states.kk.lo,
        d_kv_hi_ptr=d_states.kv.hi, d_kv_lo_ptr=d_states.kv.lo,
        decayed_inner_ptr=work.decayed_inner, offset_ptr=call.offsets, first=part.first, last=part.last,
        H=call.H, D=call.D, V=call.V, tiles_kk=tiles_kk, tiles_kv=tiles_kv, BM=rows, BV=call.config.wide_row,
        SOLVE=call.solve, HAS_INITIAL=call.has_initial, HAS_FINAL=d_final.kv is not None, WIDE=call.wide,
        **call.config.gradients,
    )  # fmt: skip
