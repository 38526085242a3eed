"""The scan of both states, chunk by chunk, and its reverse for their gradients.

Forward, with the weights of `prepare.weigh_tokens`:

    S <- decay S + K^T diag(to) [K | V]

Backward (paper, section 4.3; zeta_c = e^{G_c}), with G_ and W_ the gradients of S_kk and S_kv:

    G_ <- decay G_ - ((zeta o Z)^T X + (zeta o X)^T Z) / 2 - pull S_0 - K^T diag(b beta^2 r^2) K
    W_ <- decay W_ + scale (zeta o Y)^T dO             b_j = sum_{c >= j} M_{c,j} w_c zeta_c
                                                       pull = sum_c w_c zeta_c^2

The forward scan forms what it adds as it goes, in spans of EVERY chunks side by side: first every span sums up
what it adds by itself, `join_edges` makes of these sums the states at the spans' edges, and from there all spans
are scanned for the state before each chunk; the backward pass does that last step anew. Backwards a step would be
six tiles, so all chunks' increments are formed first, side by side, and then summed up in place.

Every program owns a tile of one head's state and goes through chunks of one sequence. A call covers chunks from
`first` to `last`; the one sequence that crosses either edge is handed over in `edge`.

Legend: N sequences, NT chunks, H query heads, Hk key/value heads, D key dim, V value dim; BM, BN sizes of a tile.
"""

import triton
import triton.language as tl

from .common import (
    chunk_of,
    dot,
    joined,
    key_weights,
    lo8_of,
    lo_of,
    load_matrix,
    load_pairs,
    load_rows,
    load_scalars,
    load_transposed,
    log_decays,
    past_mask,
    rough,
    split,
    store_matrix,
    store_matrix_pair,
    store_scalars,
)


@triton.jit
def _is_elsewhere(begin, end, first, last):
    """Whether a sequence has no chunk in this call; one without any chunk belongs to the first call."""
    return tl.where(begin == end, first > 0, (begin >= last) | (end <= first))


@triton.jit
def _weights(weight_ptr, decay_ptr, start, stop, chunk, h, H, C: tl.constexpr):
    """What keys weigh at their chunk's end [C], and the chunk's decay."""
    weight = load_scalars(weight_ptr, start, stop, H, h, C)
    return weight, tl.load(decay_ptr + chunk * H + h, mask=start < stop, other=1.0)


@triton.jit(do_not_specialize=["first_of_all", "last_of_all", "chunks", "N"])
def scan_states(
    k_ptr, v_ptr, to_kk_ptr, to_kv_ptr, decay_ptr,  # [tokens, Hk, D], [tokens, Hk, V], [tokens, H] twice, [NT, H]
    initial_kk_ptr, initial_kv_ptr, final_kk_ptr, final_kv_ptr,  # [N, H, D, D], [N, H, D, V] float32, or no use
    edge_kk_ptr, edge_kv_ptr, fade_ptr,  # before every EVERY-th chunk, [., H, D, D], [., H, D, V], [., H] float32
    kk_hi_ptr, kk_lo_ptr, kv_hi_ptr, kv_lo_ptr,  # [chunks, H, D, D], [chunks, H, D, V]; lo of no use if
    # WIDE, kk_lo bfloat16
    chunk_ptr, offset_ptr, crossing_ptr,  # [NT, 2], [N + 1], [edges] int64: the sequence that crosses it, or -1
    first_of_all, last_of_all, chunks, N, H, Hk, D: tl.constexpr, V: tl.constexpr, tiles,
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVERY: tl.constexpr, PIPELINE: tl.constexpr,
    SUM_ONLY: tl.constexpr, SOLVE: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Chunks `first_of_all` to `last_of_all` in spans side by side: a program for each of the N sequences, from
    its begin to the next edge, and one for each edge, with the sequence that crosses it.

    SUM_ONLY: a program for each span. No state is stored, but at the span's end what the sequence that goes on
    there has summed up in the span, and what is left there of the state at the span's begin (0 if it began later).
    """
    program = tl.program_id(0)
    tile, h = program % tiles, (program // tiles) % H
    program = program // (tiles * H)
    n = program.to(tl.int64)
    if SUM_ONLY:
        first = program * EVERY
        n = tl.load(crossing_ptr + program + 1)
    elif program < N:
        first = (tl.load(offset_ptr + n) // EVERY * EVERY).to(tl.int32)
    else:
        first = first_of_all + (program - N) * EVERY
        n = tl.load(crossing_ptr + first // EVERY)
    if n < 0:
        return
    begin, end = tl.load(offset_ptr + n), tl.load(offset_ptr + n + 1)
    last = tl.minimum(first + EVERY, last_of_all)
    if not SUM_ONLY:
        # A sequence without chunks is where its chunk would be; that may be behind the last one of all.
        behind = (begin == end) & (begin == last_of_all) & (last_of_all == chunks)
        if (begin < first_of_all) & (program < N) | (begin >= last_of_all) & (behind == 0):
            return
    hk = h // (H // Hk)
    columns_kk = tl.cdiv(D, BN) if SOLVE else 0
    columns = columns_kk + tl.cdiv(V, BN)
    is_kk = tile % columns < columns_kk
    row = (tile // columns) * BM
    column = tl.where(is_kk, tile % columns, tile % columns - columns_kk) * BN
    width = tl.where(is_kk, D, V)
    right_ptr = k_ptr if is_kk else v_ptr
    to_ptr = to_kk_ptr if is_kk else to_kv_ptr
    edge_ptr = edge_kk_ptr if is_kk else edge_kv_ptr
    if not SUM_ONLY:
        hi_ptr = kk_hi_ptr if is_kk else kv_hi_ptr

    S = tl.zeros([BM, BN], tl.float32)
    fade = tl.where(begin < first, 1.0, 0.0)
    if begin < first:
        if not SUM_ONLY:
            S = load_matrix(edge_ptr, first // EVERY * H + h, D, width, row, column, BM, BN)
    elif HAS_INITIAL:
        initial_ptr = initial_kk_ptr if is_kk else initial_kv_ptr
        S = load_matrix(initial_ptr, n * H + h, D, width, row, column, BM, BN)
        if is_kk:
            S = 0.5 * (S + load_transposed(initial_ptr, n * H + h, D, D, column, row, BN, BM))

    here = tl.maximum(begin, first)
    there = tl.minimum(end, last)
    if here < there:
        start, stop = chunk_of(chunk_ptr, here)
        # The next chunks are on their way to shared memory while this one is added (PIPELINE of them), its
        # few numbers come by register: a step must not wait for memory.
        weight, decay = _weights(to_ptr, decay_ptr, start, stop, here, h, H, C)
        for chunk in tl.range(here, there, num_stages=PIPELINE):
            keys = load_rows(k_ptr, start, stop, Hk, hk, D, row, C, BM)
            right = load_rows(right_ptr, start, stop, Hk, hk, width, column, C, BN)
            start += C
            next_stop = tl.where(chunk + 1 < there, stop, start)
            next_weight, next_decay = _weights(to_ptr, decay_ptr, start, next_stop, chunk + 1, h, H, C)
            if not SUM_ONLY:
                index = (chunk - first_of_all) * H + h
                hi = rough(S, WIDE)
                store_matrix(hi_ptr, hi, index, D, width, row, column, BM, BN)
                if not WIDE:
                    if is_kk:
                        lo = rough(S - hi.to(tl.float32), WIDE)
                        store_matrix(kk_lo_ptr, lo, index, D, D, row, column, BM, BN)
                    else:
                        store_matrix(kv_lo_ptr, lo8_of(S, hi), index, D, V, row, column, BM, BN)
            hi, lo = split(right.to(tl.float32) * weight[:, None], WIDE)
            transposed = tl.trans(rough(keys, WIDE))
            S = dot(transposed, hi, S * decay, WIDE)
            if not WIDE:
                S = dot(transposed, lo, S, WIDE)
            fade = fade * decay
            weight, decay = next_weight, next_decay

    if SUM_ONLY:
        store_matrix(edge_ptr, S, last // EVERY * H + h, D, width, row, column, BM, BN)
        tl.store(fade_ptr + (last // EVERY * H + h), fade)
    elif HAS_FINAL:
        if (begin == end) | (end <= last):
            final_ptr = final_kk_ptr if is_kk else final_kv_ptr
            store_matrix(final_ptr, S, n * H + h, D, width, row, column, BM, BN)


@triton.jit(do_not_specialize=["edges"])
def join_edges(edge_ptr, fade_ptr, edges, H, elements, BLOCK: tl.constexpr):
    """States at the edges [edges, H, elements] from what each span has summed up, in place; fade [edges, H].

    Edge 0 is of no use, and so are those in whose place no sequence goes on: nothing of them is taken further.
    """
    blocks = tl.cdiv(elements, BLOCK)
    h, place = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    S = tl.zeros([BLOCK], tl.float32)
    for edge in range(1, edges):
        row = (edge * H + h).to(tl.int64)
        fade = tl.load(fade_ptr + row)
        added = tl.load(edge_ptr + row * elements + place, mask=inside, other=0.0)
        S = tl.where(fade == 0.0, 0.0, S * fade) + added
        tl.store(edge_ptr + row * elements + place, S, mask=inside)


@triton.jit
def _operands(
    hi_ptr, lo_ptr, start, stop, H, h, dim, first, C: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """hi and lo [C, BLOCK] of rows that are kept as pairs, columns from `first`; lo is hi if WIDE."""
    hi = load_rows(hi_ptr, start, stop, H, h, dim, first, C, BLOCK)
    lo = hi
    if not WIDE:
        lo = lo_of(hi, load_rows(lo_ptr, start, stop, H, h, dim, first, C, BLOCK))
    return hi, lo


@triton.jit
def _weighted(
    hi_ptr, lo_ptr, weight, start, stop, H, h, dim, first, C: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The same of weight [C] times the rows, split anew."""
    hi = load_rows(hi_ptr, start, stop, H, h, dim, first, C, BLOCK)
    if WIDE:
        x = hi.to(tl.float32)
    else:
        x = joined(hi, load_rows(lo_ptr, start, stop, H, h, dim, first, C, BLOCK))
    return split(x * weight[:, None], WIDE)


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
    d_hi_ptr, d_lo_ptr, b_ptr, pull_ptr,  # out: [chunks, H, D, D]; [tokens, H] and [chunks, H] float32
    chunk_ptr, first_chunk, H, Hk, D: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """What every chunk adds to G_ on the way back but for pull S_0, BD rows and HALF columns a program."""
    program = tl.program_id(0).to(tl.int64)
    half, program = (program % (BD // HALF)).to(tl.int32), program // (BD // HALF)
    h, local = program % H, program // H
    start, stop = chunk_of(chunk_ptr, first_chunk + local)
    if start >= stop:
        return
    hk = h // (H // Hk)
    column = half * HALF
    G = log_decays(g_ptr, start, stop, H, h, C)
    half_zeta = -0.5 * tl.exp(G)
    weighted = load_scalars(w_ptr, start, stop, H, h, C) * tl.exp(G)
    b = tl.sum(past_mask(G, C) * weighted[:, None], 0)
    if half == 0:
        store_scalars(b_ptr, b, start, stop, H, h, C)
        tl.store(pull_ptr + program, tl.sum(weighted * tl.exp(G), 0))
    beta, key_scale = key_weights(beta_ptr, key_scale_ptr, start, stop, H, h, Hk, hk, C, HAS_BETA, NORMALIZE)
    b = b * beta * beta * key_scale * key_scale
    row = program * C
    dS = tl.zeros([BD, HALF], tl.float32)
    z_hi, z_lo = _operands(z_hi_ptr, z_lo_ptr, row, row + C, 1, 0, BD, 0, C, BD, WIDE)
    x_hi, x_lo = _weighted(x_hi_ptr, x_lo_ptr, half_zeta, start, stop, H, h, D, 0, C, BD, WIDE)
    if HALF == BD:
        dS = _cross(z_hi, z_lo, x_hi, x_lo, dS, WIDE)
        dS = _cross(x_hi, x_lo, z_hi, z_lo, dS, WIDE)
    else:
        right_hi, right_lo = _weighted(x_hi_ptr, x_lo_ptr, half_zeta, start, stop, H, h, D, column, C, HALF, WIDE)
        dS = _cross(z_hi, z_lo, right_hi, right_lo, dS, WIDE)
        right_hi, right_lo = _operands(z_hi_ptr, z_lo_ptr, row, row + C, 1, 0, BD, column, C, HALF, WIDE)
        dS = _cross(x_hi, x_lo, right_hi, right_lo, dS, WIDE)
    left = load_rows(k_ptr, start, stop, Hk, hk, D, 0, C, BD)
    right = load_rows(k_ptr, start, stop, Hk, hk, D, column, C, HALF).to(tl.float32) * -b[:, None]
    dS = dot(tl.trans(rough(left, WIDE)), rough(right, WIDE), dS, WIDE)
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
    h, local = program % H, program // H
    start, stop = chunk_of(chunk_ptr, first_chunk + local)
    if start >= stop:
        return
    zeta = tl.exp(log_decays(g_ptr, start, stop, H, h, C))
    y = blend(q_ptr, x_hi_ptr, x_lo_ptr, alpha_ptr, query_scale_ptr, start, stop, H, h, D,
              C, BD, SOLVE, HAS_ALPHA, NORMALIZE, WIDE)  # fmt: skip
    hi, lo = split(y * (scale * zeta)[:, None], WIDE)
    dO = rough(load_rows(do_ptr, start, stop, H, h, V, column, C, BV), WIDE)
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
        return load_pairs(x_hi_ptr, x_lo_ptr, start, stop, H, h, D, C, BD, WIDE)
    else:
        y = load_rows(q_ptr, start, stop, H, h, D, 0, C, BD).to(tl.float32)
        if NORMALIZE:
            y = y * load_scalars(query_scale_ptr, start, stop, H, h, C)[:, None]
        if SOLVE:
            x = load_pairs(x_hi_ptr, x_lo_ptr, start, stop, H, h, D, C, BD, WIDE)
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
    decay_ptr, pull_ptr,  # [NT, H] float32, [chunks, H] float32
    kk_ptr, kv_ptr,  # first states of the chunks (hi), [chunks, H, D, D], [chunks, H, D, V]
    d_final_kk_ptr, d_final_kv_ptr, d_initial_kk_ptr, d_initial_kv_ptr,  # [N, H, D, D], [N, H, D, V] float32
    edge_in_kk_ptr, edge_in_kv_ptr, edge_out_kk_ptr, edge_out_kv_ptr,  # [H, D, D], [H, D, V] float32
    d_kk_hi_ptr, d_kk_lo_ptr, d_kv_hi_ptr, d_kv_lo_ptr,  # increments, replaced by gradients at the chunks' ends
    through_ptr,  # out: [chunks, H, 2, D] float32, e^{G_C} times sums over rows of <G_, S_0>, of S_kk and S_kv
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
    sums_ptr = through_ptr + tl.where(is_kk, 0, D) + rows

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
        added, more = _pair(d_hi_ptr, d_lo_ptr, index, D, width, row, BM, BV, WIDE)
        S = load_matrix(state_ptr, index, D, width, row, 0, BM, BV)
        decay = tl.load(decay_ptr + (stop_chunk - 1) * H + h)
        for step in range(0, steps):
            chunk = stop_chunk - 1 - step
            index = (chunk - first) * H + h
            before = tl.where(step + 1 < steps, index - H, index)
            next_added, next_more = _pair(d_hi_ptr, d_lo_ptr, before, D, width, row, BM, BV, WIDE)
            next_S = load_matrix(state_ptr, before, D, width, row, 0, BM, BV)
            next_decay = tl.load(decay_ptr + tl.where(step + 1 < steps, chunk - 1, chunk) * H + h)
            store_matrix_pair(d_hi_ptr, d_lo_ptr, dS, index, D, width, row, 0, BM, BV, WIDE)
            faded, first_state = dS * decay, S.to(tl.float32)
            tl.store(sums_ptr + index * 2 * D, tl.sum(faded * first_state, 1), mask=rows < D)
            dS = faded + (added if WIDE else joined(added, more))
            if SOLVE:
                dS -= tl.load(pull_ptr + index, mask=is_kk, other=0.0) * first_state
            added, more, S, decay = next_added, next_more, next_S, next_decay

    if begin < first:
        edge_ptr = edge_out_kk_ptr if is_kk else edge_out_kv_ptr
        store_matrix(edge_ptr, dS, h, D, width, row, 0, BM, BV)
    elif HAS_INITIAL:
        d_initial_ptr = d_initial_kk_ptr if is_kk else d_initial_kv_ptr
        store_matrix(d_initial_ptr, dS, n * H + h, D, width, row, 0, BM, BV)
