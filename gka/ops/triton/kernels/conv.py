"""Short causal convolution over time, channel by channel, and SiLU after it, forward and backward.

    u_t = sum_{j=0}^{W-1} w_j x_{t-j}      y_t = u_t s_t                            s_t = 1 / (1 + e^{-u_t})
    du_t = dy_t s_t (1 + u_t (1 - s_t))    dx_t = sum_j w_j du_{t+j}                dw_j = sum_t du_t x_{t-j}

A program walks through SPAN tokens of a block of channels and holds the last W - 1 of x (backwards of du, too) in
registers, so that every row comes from memory once; u is computed anew in the backward pass, and du of the W - 1
tokens behind the span as well. Rows are loaded R at a time, before any of theirs is stored: between a load and a
store that may be of the same address the compiler moves nothing. All arithmetic is float32.

Rows of a batch do not see each other, nor do packed sequences: `place` says of each token its number in its
sequence, and tap j is of a token only if that is at least j. Before a row are zeros, or the inputs of `front`.

A launch convolves up to three tensors x of the same tokens, each with channels of its own. The taps of all are one
tensor, in the order of the x.

Legend: T tokens of each of the batch's rows; C0, C1, C2 channels of each x, 0 for a missing one; C those of one; W
width; R rows at a time; BC block of channels.
"""

import triton
import triton.language as tl

from .arithmetic import cast


@triton.jit
def _channels_of(program, C0, C1, C2, BC: tl.constexpr):
    """Of a program: which x it is for, its block of that x, the x's channels, those before it, and its span."""
    blocks0, blocks1 = tl.cdiv(C0, BC), tl.cdiv(C1, BC)
    blocks = blocks0 + blocks1 + tl.cdiv(C2, BC)
    block = program % blocks
    is_0, is_1 = block < blocks0, block < blocks0 + blocks1
    before = tl.where(is_0, 0, tl.where(is_1, blocks0, blocks0 + blocks1))
    C = tl.where(is_0, C0, tl.where(is_1, C1, C2))
    return is_0, is_1, block - before, C, tl.where(is_0, 0, tl.where(is_1, C0, C0 + C1)), program // blocks


@triton.jit
def _span_of(number, T, SPAN: tl.constexpr):
    """Of a span: the first and the last token + 1 of its row, and its first token."""
    spans = tl.cdiv(T, SPAN)
    start = (number // spans).to(tl.int64) * T
    return start, start + T, start + (number % spans) * SPAN


@triton.jit
def _taps(weight_ptr, c, C, W: tl.constexpr):
    """w_0 to w_{W-1}, [BC] float32 each, of weight [C, W] whose last column is w_0."""
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.load(weight_ptr + c * W + (W - 1 - j), mask=c < C, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _inside(c, C, t, start, end):
    """Which channels there are of token t, [BC]; none outside of start to end - 1."""
    return c < tl.where((t >= start) & (t < end), C, 0)


@triton.jit
def _rows(ptr, t, step: tl.constexpr, start, end, c, C, R: tl.constexpr):
    """Tokens t, t + step, ..., R of them, [BC] float32 each; zero outside of start to end - 1."""
    rows = ()
    for r in tl.static_range(R):
        inside = _inside(c, C, t + r * step, start, end)
        rows = rows + (tl.load(ptr + (t + r * step) * C + c, mask=inside, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _places(place_ptr, t, end, R: tl.constexpr, PACKED: tl.constexpr):
    """The tokens' numbers in their sequences, R scalars; zero from end on. Not read unless PACKED."""
    places = ()
    for r in tl.static_range(R):
        if PACKED:
            places = places + (tl.load(place_ptr + t + r, mask=t + r < end, other=0),)
        else:
            places = places + (0,)
    return places


@triton.jit
def _past(x_ptr, place_ptr, first, start, end, c, C, W: tl.constexpr, PACKED: tl.constexpr):
    """The W - 1 rows before the first token of a span, the last first; zero outside of its row or sequence."""
    if PACKED:
        start = first - tl.load(place_ptr + first)
    return _rows(x_ptr, first - 1, -1, start, end, c, C, W - 1)


@triton.jit
def _front_places(ptr, number, T, c, C, before, channels, first, start, W: tl.constexpr, SPAN: tl.constexpr):
    """Addresses of the W - 1 rows of a tensor like `front`, the last first, and which channels there are: none but
    for the first span of a row.
    """
    row = number // tl.cdiv(T, SPAN)
    places = ()
    for j in tl.static_range(W - 1):
        places = places + (ptr + (row.to(tl.int64) * (W - 1) + (W - 2 - j)) * channels + before + c,)
    return places, c < tl.where(first == start, C, 0)


@triton.jit
def _with_front(past, places, inside, W: tl.constexpr):
    """The rows before the first token of a span, which are zero before a row, with those of the front added."""
    rows = ()
    for j in tl.static_range(W - 1):
        rows = rows + (past[j] + tl.load(places[j], mask=inside, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _older(past, place, W: tl.constexpr, PACKED: tl.constexpr):
    """The W - 1 rows before a token, the last first; zero where the token is the first of its sequence."""
    older = ()
    for j in tl.static_range(W - 1):
        older = older + ((tl.where(place > 0, past[j], 0.0) if PACKED else past[j]),)
    return older


@triton.jit
def _convolved(taps, x, older, W: tl.constexpr):
    u = taps[0] * x
    for j in tl.static_range(W - 1):
        u += taps[j + 1] * older[j]
    return u


@triton.jit(do_not_specialize=["T"])
def convolve(
    x0_ptr, x1_ptr, x2_ptr,  # [B T, C] each
    weight_ptr, place_ptr,  # [C0 + C1 + C2, W], [T] int32 if PACKED
    front_ptr,  # [B, W - 1, C0 + C1 + C2] if FRONT, and then not PACKED
    y0_ptr, y1_ptr, y2_ptr,  # out: [B T, C] each
    T, C0, C1, C2,
    W: tl.constexpr, PACKED: tl.constexpr, FRONT: tl.constexpr, SPAN: tl.constexpr, R: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    is_0, is_1, block, C, before, number = _channels_of(tl.program_id(0), C0, C1, C2, BC)
    x_ptr = x0_ptr if is_0 else (x1_ptr if is_1 else x2_ptr)
    y_ptr = y0_ptr if is_0 else (y1_ptr if is_1 else y2_ptr)
    c = block * BC + tl.arange(0, BC)
    start, end, first = _span_of(number, T, SPAN)
    taps = _taps(weight_ptr + before * W, c, C, W)
    past = _past(x_ptr, place_ptr, first, start, end, c, C, W, PACKED)
    if FRONT:
        fronts, inside = _front_places(front_ptr, number, T, c, C, before, C0 + C1 + C2, first, start, W, SPAN)
        past = _with_front(past, fronts, inside, W)
    for done in range(0, SPAN, R):
        rows = _rows(x_ptr, first + done, 1, start, end, c, C, R)
        places = _places(place_ptr, first + done, end, R, PACKED)
        for r in tl.static_range(R):
            t = first + done + r
            past = _older(past, places[r], W, PACKED)
            u = _convolved(taps, rows[r], past, W)
            y = cast(u * tl.sigmoid(u), y_ptr.dtype.element_ty)
            tl.store(y_ptr + t * C + c, y, mask=_inside(c, C, t, start, end))
            past = ((rows[r],) + past)[: W - 1]


@triton.jit(do_not_specialize=["T"])
def convolve_backward(
    dy0_ptr, dy1_ptr, dy2_ptr, x0_ptr, x1_ptr, x2_ptr,  # [B T, C] each
    weight_ptr, place_ptr, front_ptr,  # as in convolve
    dx0_ptr, dx1_ptr, dx2_ptr, dfront_ptr,  # out: [B T, C] each; as front, if FRONT
    parts_ptr,  # out: [B spans, C0 + C1 + C2, W] float32, the gradient of the weight by spans
    T, C0, C1, C2,
    W: tl.constexpr, PACKED: tl.constexpr, FRONT: tl.constexpr, SPAN: tl.constexpr, R: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """R is at least W - 1: the R tokens behind the span are walked through for the last of its dx."""
    is_0, is_1, block, C, before, number = _channels_of(tl.program_id(0), C0, C1, C2, BC)
    dy_ptr = dy0_ptr if is_0 else (dy1_ptr if is_1 else dy2_ptr)
    x_ptr = x0_ptr if is_0 else (x1_ptr if is_1 else x2_ptr)
    dx_ptr = dx0_ptr if is_0 else (dx1_ptr if is_1 else dx2_ptr)
    c = block * BC + tl.arange(0, BC)
    start, end, first = _span_of(number, T, SPAN)
    taps = _taps(weight_ptr + before * W, c, C, W)
    last = tl.minimum(first + SPAN, end)
    past = _past(x_ptr, place_ptr, first, start, end, c, C, W, PACKED)
    if FRONT:
        fronts, inside = _front_places(front_ptr, number, T, c, C, before, C0 + C1 + C2, first, start, W, SPAN)
        past = _with_front(past, fronts, inside, W)
        d_places, inside = _front_places(dfront_ptr, number, T, c, C, before, C0 + C1 + C2, first, start, W, SPAN)
    dtaps = ()
    for _j in tl.static_range(W):
        dtaps = dtaps + (tl.zeros([BC], tl.float32),)
    sums = dtaps[: W - 1]  # dx so far of the W - 1 tokens before, the last first
    for done in range(0, SPAN + R, R):
        rows = _rows(x_ptr, first + done, 1, start, end, c, C, R)
        dys = _rows(dy_ptr, first + done, 1, start, end, c, C, R)
        places = _places(place_ptr, first + done, end, R, PACKED)
        for r in tl.static_range(R):
            t = first + done + r
            past = _older(past, places[r], W, PACKED)
            u = _convolved(taps, rows[r], past, W)
            s = tl.sigmoid(u)
            du = dys[r] * (s + u * (s - s * s))
            own = tl.where(t < last, du, 0.0)
            past = (rows[r],) + past
            sums = (tl.zeros([BC], tl.float32),) + sums
            new_dtaps, new_sums = (), ()
            for j in tl.static_range(W):
                new_dtaps = new_dtaps + (dtaps[j] + own * past[j],)
                new_sums = new_sums + (sums[j] + taps[j] * (tl.where(places[r] >= j, du, 0.0) if PACKED else du),)
            done_with = t - (W - 1)
            dx = cast(new_sums[W - 1], dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + done_with * C + c, dx, mask=_inside(c, C, done_with, first, last))
            if FRONT:
                if r < W - 1:
                    if done == 0:
                        tl.store(d_places[W - 2 - r], cast(dx, dfront_ptr.dtype.element_ty), mask=inside)
            dtaps, sums, past = new_dtaps, new_sums[: W - 1], past[: W - 1]
    for j in tl.static_range(W):
        place = parts_ptr + (number.to(tl.int64) * (C0 + C1 + C2) + before + c) * W + (W - 1 - j)
        tl.store(place, dtaps[j], mask=c < C)


@triton.jit
def convolve_step(
    x_ptr, weight_ptr, pool_ptr, index_ptr,  # [B, C], [C, W], [N, C, W - 1], [B] int32 or int64
    y_ptr,  # out: [B, C]
    C, x_stride, row_stride, channel_stride, tap_stride,  # elements between rows of x; those of the pool
    W: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One token of every sequence; the last W - 1 inputs of sequence b are row index[b] of the pool, in place.

    With an index below 0, y is zero and no row is read or written.
    """
    blocks = tl.cdiv(C, BC)
    b = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    row = tl.load(index_ptr + b).to(tl.int64)
    inside = c < tl.where(row >= 0, C, 0)
    x = tl.load(x_ptr + b.to(tl.int64) * x_stride + c, mask=inside, other=0.0)
    place = pool_ptr + row * row_stride + c.to(tl.int64) * channel_stride
    held = ()  # the oldest first
    for j in tl.static_range(W - 1):
        held = held + (tl.load(place + j * tap_stride, mask=inside, other=0.0),)
    held = held + (cast(x, pool_ptr.dtype.element_ty),)
    taps = _taps(weight_ptr, c, C, W)
    u = taps[0] * x.to(tl.float32)
    for j in tl.static_range(W - 1):
        u += taps[W - 1 - j] * held[j].to(tl.float32)
        tl.store(place + j * tap_stride, held[j + 1], mask=inside)
    y = tl.where(inside, u * tl.sigmoid(u), 0.0)
    tl.store(y_ptr + b.to(tl.int64) * C + c, cast(y, y_ptr.dtype.element_ty), mask=c < C)
