"""What the kernels share: rows of tokens, matrices, and decays inside a chunk.

A chunk is C consecutive tokens of one sequence. Rows past the sequence's end are masked: their keys, values,
queries and gates read as zero, so they change no state and nothing of theirs is stored.

Where WIDE is False rows and matrices may be kept as pairs (`arithmetic.py`).

Legend: C tokens of a chunk; c, j, i tokens in it; D key dim, V value dim; G_c = g_1 + ... + g_c.
"""

import triton
import triton.language as tl

from ...solvers import NORM_FLOOR as _NORM_FLOOR
from .arithmetic import INTERPRETED, cast, joined, lo8_of, lo_of, to_operand

# e^g is 0 in float32 long before; a finite bound keeps -inf - (-inf) out of the differences.
G_FLOOR = tl.constexpr(-110.0)
LOG2_E = tl.constexpr(1.4426950408889634)
NORM_FLOOR = tl.constexpr(_NORM_FLOOR)


@triton.jit
def chunk_of(chunk_ptr, chunk):
    """First token of a chunk and one past the last of its sequence, int64, in the flattened batch."""
    return tl.load(chunk_ptr + 2 * chunk), tl.load(chunk_ptr + 2 * chunk + 1)


@triton.jit
def floored(norm):
    """max(||S||_F, NORM_FLOOR), and 0 where S is 0."""
    return tl.where(norm > 0.0, tl.maximum(norm, NORM_FLOOR), 0.0)


@triton.jit
def head_and_chunk(program, chunk_ptr, first_chunk, H):
    """h, and `chunk_of`, of a program of a part: H programs a chunk, from first_chunk on."""
    start, end = chunk_of(chunk_ptr, first_chunk + program // H)
    return program % H, start, end


# Addresses are a scalar of 64 bits, which any tensor may need, plus offsets of 32 bits inside a tile.


@triton.jit
def _rows_left(start, end, C: tl.constexpr):
    """Whether each of a chunk's C rows exists, [C]."""
    return tl.arange(0, C) < tl.minimum(end - start, C).to(tl.int32)


@triton.jit
def load_scalars(ptr, start, end, H, h, C: tl.constexpr):
    """[C] in float32 of a tensor [tokens, H]; zero past the end."""
    place = ptr + (start * H + h) + tl.arange(0, C) * H
    return tl.load(place, mask=_rows_left(start, end, C), other=0.0).to(tl.float32)


@triton.jit
def store_scalars(ptr, x, start, end, H, h, C: tl.constexpr):
    place = ptr + (start * H + h) + tl.arange(0, C) * H
    tl.store(place, cast(x, ptr.dtype.element_ty), mask=_rows_left(start, end, C))


@triton.jit
def load_rows(ptr, start, end, H, h, dim, first, C: tl.constexpr, BLOCK: tl.constexpr):
    """[C, BLOCK] of a tensor [tokens, H, dim], columns from `first`; zero past the end and past dim."""
    d = first + tl.arange(0, BLOCK)
    place = ptr + (start * H + h) * dim + (tl.arange(0, C)[:, None] * (H * dim) + d[None, :])
    return tl.load(place, mask=_rows_left(start, end, C)[:, None] & (d < dim)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, x, start, end, H, h, dim, first, C: tl.constexpr, BLOCK: tl.constexpr):
    d = first + tl.arange(0, BLOCK)
    place = ptr + (start * H + h) * dim + (tl.arange(0, C)[:, None] * (H * dim) + d[None, :])
    inside = _rows_left(start, end, C)[:, None] & (d < dim)[None, :]
    tl.store(place, cast(x, ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_pairs(
    hi_ptr, lo_ptr, start, end, H, h, dim, first, C: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """[C, BLOCK] float32 of rows that are kept as pairs, columns from `first`; lo_ptr is not read if WIDE."""
    hi = load_rows(hi_ptr, start, end, H, h, dim, first, C, BLOCK)
    if WIDE:
        return hi.to(tl.float32)
    else:
        return joined(hi, load_rows(lo_ptr, start, end, H, h, dim, first, C, BLOCK))


@triton.jit
def load_operands(
    hi_ptr, lo_ptr, start, end, H, h, dim, first, C: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """The rows of `load_pairs` as operands hi and lo [C, BLOCK], whose sum they are; lo is hi if WIDE."""
    hi = load_rows(hi_ptr, start, end, H, h, dim, first, C, BLOCK)
    lo = hi
    if not WIDE:
        lo = lo_of(hi, load_rows(lo_ptr, start, end, H, h, dim, first, C, BLOCK))
    return hi, lo


@triton.jit
def store_pairs(
    hi_ptr, lo_ptr, x, start, end, H, h, dim, C: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """Keep rows x [C, BLOCK] in float32 as pairs."""
    hi = to_operand(x, WIDE)
    store_rows(hi_ptr, hi, start, end, H, h, dim, 0, C, BLOCK)
    if not WIDE:
        store_rows(lo_ptr, lo8_of(x, hi), start, end, H, h, dim, 0, C, BLOCK)


@triton.jit
def load_matrix(ptr, index, rows, columns, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of matrix number `index` of a tensor [n, rows, columns], from (row, column)."""
    i = row + tl.arange(0, ROWS)
    j = column + tl.arange(0, COLUMNS)
    place = ptr + index.to(tl.int64) * (rows * columns) + (i[:, None] * columns + j[None, :])
    return tl.load(place, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)


@triton.jit
def load_matrix_operands(
    hi_ptr, lo_ptr, index, rows, columns, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A matrix that is kept as a pair, as operands hi and lo [ROWS, COLUMNS]; lo is hi if WIDE."""
    hi = load_matrix(hi_ptr, index, rows, columns, row, column, ROWS, COLUMNS)
    lo = hi
    if not WIDE:
        lo = lo_of(hi, load_matrix(lo_ptr, index, rows, columns, row, column, ROWS, COLUMNS))
    return hi, lo


@triton.jit
def load_transposed(ptr, index, rows, columns, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The transpose of `load_matrix`, [COLUMNS, ROWS]."""
    i = row + tl.arange(0, ROWS)
    j = column + tl.arange(0, COLUMNS)
    place = ptr + index.to(tl.int64) * (rows * columns) + (i[None, :] * columns + j[:, None])
    return tl.load(place, mask=(j < columns)[:, None] & (i < rows)[None, :], other=0.0)


@triton.jit
def store_matrix(ptr, x, index, rows, columns, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i = row + tl.arange(0, ROWS)
    j = column + tl.arange(0, COLUMNS)
    place = ptr + index.to(tl.int64) * (rows * columns) + (i[:, None] * columns + j[None, :])
    tl.store(place, cast(x, ptr.dtype.element_ty), mask=(i < rows)[:, None] & (j < columns)[None, :])


@triton.jit
def store_matrix_pair(
    hi_ptr, lo_ptr, x, index, rows, columns, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Keep x [ROWS, COLUMNS] in float32 as a pair; lo_ptr None keeps hi alone."""
    hi = to_operand(x, WIDE)
    store_matrix(hi_ptr, hi, index, rows, columns, row, column, ROWS, COLUMNS)
    if not WIDE:
        if lo_ptr is not None:
            store_matrix(lo_ptr, lo8_of(x, hi), index, rows, columns, row, column, ROWS, COLUMNS)


@triton.jit
def _load_gates(g_ptr, start, end, H, h, C: tl.constexpr):
    """g [C], at least G_FLOOR; zero past the end."""
    return tl.maximum(load_scalars(g_ptr, start, end, H, h, C), G_FLOOR)


@triton.jit
def log_decays(g_ptr, start, end, H, h, C: tl.constexpr):
    """G [C]."""
    return tl.cumsum(_load_gates(g_ptr, start, end, H, h, C), 0)


@triton.jit
def _exp2(x):
    """2^x, with 0 for numbers below the normal ones: one instruction where `tl.exp2` takes four."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def past_mask(G, C: tl.constexpr):
    """M [C, C] with M_{c,j} = e^{G_c - G_j} for j <= c, else 0; e^{-G_j} alone, which overflows, never."""
    c = tl.arange(0, C)
    G = G * LOG2_E
    return _exp2(tl.where(c[:, None] >= c[None, :], G[:, None] - G[None, :], float("-inf")))


@triton.jit
def both_masks(G, C: tl.constexpr):
    """`past_mask` and its transpose in one: e^{G_c - G_j} of the later and the earlier of two tokens [C, C]."""
    c = tl.arange(0, C)
    G = G * LOG2_E
    return _exp2(tl.where(c[:, None] >= c[None, :], G[:, None] - G[None, :], G[None, :] - G[:, None]))


@triton.jit
def _decay_and_add(decay, total, next_decay, next_total):
    """One span of tokens from two neighbours: its decay, and the sum at its end."""
    return decay * next_decay, total * next_decay + next_total


@triton.jit
def sums_of_earlier(x, power, g_ptr, start, end, H, h, C: tl.constexpr):
    """sum_{i <= c} e^{power (G_c - G_i)} x_i [C], without a mask [C, C]."""
    g = _load_gates(g_ptr, start, end, H, h, C)
    _, sums = tl.associative_scan((tl.exp(power * g), x), 0, _decay_and_add)
    return sums


@triton.jit
def sums_of_later(x, power, g_ptr, start, end, H, h, C: tl.constexpr):
    """sum_{c >= i} e^{power (G_c - G_i)} x_c [C], without a mask [C, C]."""
    next_g = _load_gates(g_ptr, start + 1, end, H, h, C)
    _, sums = tl.associative_scan((tl.exp(power * next_g), x), 0, _decay_and_add, reverse=True)
    return sums


@triton.jit
def last_of(G, C: tl.constexpr):
    """G_C, the sum over the whole chunk."""
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, G, 0.0), 0)


@triton.jit
def key_weights(beta_ptr, key_scale_ptr, start, end, H, h, Hk, hk, C: tl.constexpr,
                HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr):  # fmt: skip
    """beta [C] and r [C]: keys enter as beta r k, values as beta v, with r = 1 / (||k|| + 1e-6) if normalised.

    So weights of columns stand for both: beta^2 r^2 in S_kk, beta^2 r in S_kv, and k itself stays as it came.
    """
    beta = tl.full([C], 1.0, tl.float32)
    scale = tl.full([C], 1.0, tl.float32)
    if HAS_BETA:
        beta = load_scalars(beta_ptr, start, end, H, h, C)
    if NORMALIZE:
        scale = load_scalars(key_scale_ptr, start, end, Hk, hk, C)
    return beta, scale
