"""The scan of both states, chunk by chunk, with the weights of `prepare.weigh_tokens`:

    S <- decay S + K^T diag(to) [K | V]

It forms what it adds as it goes, in spans of EVERY chunks side by side: first every span sums up what it adds by
itself, `join_edges` makes of these sums the states at the spans' edges, and from there all spans are scanned for
the state before each chunk; the backward pass does that last step anew.

Every program owns a tile of one head's state and goes through chunks of one sequence. A call covers chunks from
`first` to `last`; the one sequence that crosses either edge is handed over in `edge`.

Legend: N sequences, NT chunks, H query heads, Hk key/value heads, D key dim, V value dim; BM, BN sizes of a tile;
span_decay: product of a span's decays.
"""

import triton
import triton.language as tl
from torch import Tensor

from .. import call as sizes
from ..call import Call, Edges, KeyWeights, Part, StatePairs
from ..launch import compiling_ahead, launch, or_stand_in
from .arithmetic import dot, lo8_of, split, to_operand
from .common import chunk_of, load_matrix, load_rows, load_scalars, load_transposed, store_matrix


@triton.jit
def _weights(weight_ptr, decay_ptr, start, stop, chunk, h, H, C: tl.constexpr):
    """What keys weigh at their chunk's end [C], and the chunk's decay."""
    weight = load_scalars(weight_ptr, start, stop, H, h, C)
    return weight, tl.load(decay_ptr + chunk * H + h, mask=start < stop, other=1.0)


@triton.jit(do_not_specialize=["first_of_all", "last_of_all", "chunks", "N"])
def scan_states(
    k_ptr, v_ptr, to_kk_ptr, to_kv_ptr, decay_ptr,  # [tokens, Hk, D], [tokens, Hk, V], [tokens, H] twice, [NT, H]
    initial_kk_ptr, initial_kv_ptr, final_kk_ptr, final_kv_ptr,  # [N, H, D, D], [N, H, D, V] float32, or no use
    edge_kk_ptr, edge_kv_ptr, span_decay_ptr,  # at every EVERY-th chunk, [., H, D, D | V], [., H], float32
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
    there has summed up in the span, and the decay from the span's begin to there (0 if it began later).
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
        empty_at_end = (begin == end) & (begin == last_of_all) & (last_of_all == chunks)
        if (begin < first_of_all) & (program < N) | (begin >= last_of_all) & (empty_at_end == 0):
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
    span_decay = tl.where(begin < first, 1.0, 0.0)
    if begin < first:
        if not SUM_ONLY:
            S = load_matrix(edge_ptr, first // EVERY * H + h, D, width, row, column, BM, BN)
    elif HAS_INITIAL:
        initial_ptr = initial_kk_ptr if is_kk else initial_kv_ptr
        S = load_matrix(initial_ptr, n * H + h, D, width, row, column, BM, BN)
        if is_kk:
            S = 0.5 * (S + load_transposed(initial_ptr, n * H + h, D, D, column, row, BN, BM))

    span_first = tl.maximum(begin, first)
    span_last = tl.minimum(end, last)
    if span_first < span_last:
        start, stop = chunk_of(chunk_ptr, span_first)
        # The next chunks are on their way to shared memory while this one is added (PIPELINE of them), its
        # few numbers come by register: a step must not wait for memory.
        weight, decay = _weights(to_ptr, decay_ptr, start, stop, span_first, h, H, C)
        for chunk in tl.range(span_first, span_last, num_stages=PIPELINE):
            keys = load_rows(k_ptr, start, stop, Hk, hk, D, row, C, BM)
            right = load_rows(right_ptr, start, stop, Hk, hk, width, column, C, BN)
            start += C
            next_stop = tl.where(chunk + 1 < span_last, stop, start)
            next_weight, next_decay = _weights(to_ptr, decay_ptr, start, next_stop, chunk + 1, h, H, C)
            if not SUM_ONLY:
                index = (chunk - first_of_all) * H + h
                hi = to_operand(S, WIDE)
                store_matrix(hi_ptr, hi, index, D, width, row, column, BM, BN)
                if not WIDE:
                    if is_kk:
                        lo = to_operand(S - hi.to(tl.float32), WIDE)
                        store_matrix(kk_lo_ptr, lo, index, D, D, row, column, BM, BN)
                    else:
                        store_matrix(kv_lo_ptr, lo8_of(S, hi), index, D, V, row, column, BM, BN)
            hi, lo = split(right.to(tl.float32) * weight[:, None], WIDE)
            transposed = tl.trans(to_operand(keys, WIDE))
            S = dot(transposed, hi, S * decay, WIDE)
            if not WIDE:
                S = dot(transposed, lo, S, WIDE)
            span_decay = span_decay * decay
            weight, decay = next_weight, next_decay

    if SUM_ONLY:
        store_matrix(edge_ptr, S, last // EVERY * H + h, D, width, row, column, BM, BN)
        tl.store(span_decay_ptr + (last // EVERY * H + h), span_decay)
    elif HAS_FINAL:
        if (begin == end) | (end <= last):
            final_ptr = final_kk_ptr if is_kk else final_kv_ptr
            store_matrix(final_ptr, S, n * H + h, D, width, row, column, BM, BN)


@triton.jit(do_not_specialize=["edges"])
def join_edges(edge_ptr, span_decay_ptr, edges, H, elements, BLOCK: tl.constexpr):
    """States at the edges [edges, H, elements] from what each span has summed up, in place; span_decay [edges, H].

    Edge 0 is of no use, and so are those in whose place no sequence goes on: nothing of them is taken further.
    """
    blocks = tl.cdiv(elements, BLOCK)
    h, place = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    S = tl.zeros([BLOCK], tl.float32)
    for edge in range(1, edges):
        row = (edge * H + h).to(tl.int64)
        span_decay = tl.load(span_decay_ptr + row)
        added = tl.load(edge_ptr + row * elements + place, mask=inside, other=0.0)
        S = tl.where(span_decay == 0.0, 0.0, S * span_decay) + added
        tl.store(edge_ptr + row * elements + place, S, mask=inside)


def _launch_scan(
    call: Call, *, first: int, last: int, weights: KeyWeights, edges: Edges, span_decay: Tensor | None,
    final_kk: Tensor | None, final_kv: Tensor | None, states: StatePairs | None,
) -> None:  # fmt: skip
    """`scan_states`; without `states` it only sums up what each span adds."""
    config, every = call.config, sizes.EDGE_EVERY
    sum_only = states is None
    (BM, BN), warps = (config.span_tile, config.spans) if sum_only else (config.tile, config.scan)
    columns = (-(-call.D // BN) if call.solve else 0) + -(-call.V // BN)
    tiles, spans = -(-call.D // BM) * columns, -(-max(1, last - first) // every)
    if not call.N:
        return
    kk, kv = ((None, None), (None, None)) if states is None else states
    launch(scan_states, tiles * call.H * (spans if sum_only else call.N + spans),
        k_ptr=call.k, v_ptr=call.v, to_kk_ptr=weights.to_kk, to_kv_ptr=weights.to_kv, decay_ptr=weights.decay,
        initial_kk_ptr=or_stand_in(call.S_kk, call.S_kv), initial_kv_ptr=call.S_kv,
        final_kk_ptr=or_stand_in(final_kk, final_kv), final_kv_ptr=final_kv,
        edge_kk_ptr=or_stand_in(edges.kk, edges.kv), edge_kv_ptr=edges.kv, span_decay_ptr=span_decay,
        kk_hi_ptr=kk[0], kk_lo_ptr=kk[1], kv_hi_ptr=kv[0], kv_lo_ptr=kv[1],
        chunk_ptr=call.chunks, offset_ptr=call.offsets, crossing_ptr=call.crossing,
        first_of_all=first, last_of_all=last, chunks=call.NT, N=call.N, H=call.H, Hk=call.Hk, D=call.D, V=call.V,
        tiles=tiles, C=call.C, BM=BM, BN=BN, EVERY=every, PIPELINE=config.pipeline, SUM_ONLY=sum_only,
        SOLVE=call.solve, HAS_INITIAL=call.has_initial, HAS_FINAL=final_kv is not None, WIDE=call.wide, **warps,
    )  # fmt: skip


def launch_scan_states(
    call: Call, part: Part, *, weights: KeyWeights, edges: Edges, states: StatePairs,
    final_kk: Tensor | None = None, final_kv: Tensor | None = None,
) -> None:  # fmt: skip
    """The states before a part's chunks, and the final ones of sequences that end in it, from the edges."""
    _launch_scan(
        call, first=part.first, last=part.last, weights=weights, edges=edges, span_decay=None,
        final_kk=final_kk, final_kv=final_kv, states=states,
    )  # fmt: skip


def launch_find_edges(call: Call, *, weights: KeyWeights, edges: Edges) -> None:
    """Fill in the states at every EDGE_EVERY-th chunk: sums of the spans, then `join_edges`."""
    count = call.NT // sizes.EDGE_EVERY + 1
    if call.NT <= sizes.EDGE_EVERY and not compiling_ahead():
        return
    span_decay = call.empty(count, call.H)
    _launch_scan(
        call, first=0, last=call.NT, weights=weights, edges=edges, span_decay=span_decay,
        final_kk=None, final_kv=None, states=None,
    )  # fmt: skip
    for edge in edges:
        if edge is not None:
            elements = edge.shape[2] * edge.shape[3]
            launch(join_edges, -(-elements // 512) * call.H,
                edge_ptr=edge, span_decay_ptr=span_decay, edges=count, H=call.H, elements=elements,
                BLOCK=512, num_warps=4,
            )  # fmt: skip
