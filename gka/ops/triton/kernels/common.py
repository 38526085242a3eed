"""What the kernels share: decays inside a chunk, rows of tokens, products more exact than 16 bits.

A chunk is C consecutive tokens of one sequence. Rows past the sequence's end are masked: their keys, values,
queries and gates read as zero, so they change no state and nothing of theirs is stored.

Two arithmetics, chosen by the constexpr WIDE:
    WIDE = False  (bfloat16 inputs): operands of products are bfloat16, sums are float32. What must be exact, a
                  state, an iterate or a state's gradient, is a pair hi + lo of bfloat16, and a product of pairs is
                  three products. In memory a pair takes three bytes: hi, and as int8 (`lo8`) the eight bits of the
                  float32 number that follow those of hi.
    WIDE = True   (float32 and float16 inputs): operands are float32, products three-part TF32.

Legend: C tokens of a chunk; c, j, i tokens in it; D key dim, V value dim; G_c = g_1 + ... + g_c.
"""

import os

import triton
import triton.language as tl

from ...solvers import NORM_FLOOR as _NORM_FLOOR

# Triton's interpreter multiplies bfloat16 operands by their bits: there they are widened first.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
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
def log_decays(g_ptr, start, end, H, h, C: tl.constexpr):
    """G [C]."""
    g = load_scalars(g_ptr, start, end, H, h, C)
    return tl.cumsum(tl.maximum(g, G_FLOOR), 0)


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
def future_mask(G, C: tl.constexpr):
    """The transpose of `past_mask`."""
    c = tl.arange(0, C)
    G = G * LOG2_E
    return _exp2(tl.where(c[:, None] <= c[None, :], G[None, :] - G[:, None], float("-inf")))


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


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in another dtype, rounded to nearest; the interpreter by itself cuts bits off."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            if x.dtype == tl.float32:
                bits = x.to(tl.uint32, bitcast=True)
                x = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def to_operand(x, WIDE: tl.constexpr):
    """x as an operand of a product."""
    if WIDE:
        return x.to(tl.float32)
    else:
        return cast(x, tl.bfloat16)


@triton.jit
def split(x, WIDE: tl.constexpr):
    """x in float32 as operands hi = to_operand(x) and lo = to_operand(x - hi), which is zero if WIDE.

    In pairs of numbers: one by one the compiler converts with an instruction that is eight times slower.
    """
    if WIDE:
        return x, tl.zeros_like(x)
    elif INTERPRETED:
        hi = to_operand(x, WIDE)
        return hi, to_operand(x - hi.to(tl.float32), WIDE)
    else:
        return tl.inline_asm_elementwise(
            """
            {
                .reg .f32 a, b;
                cvt.rn.bf16x2.f32 $0, $3, $2;
                shl.b32 a, $0, 16;
                and.b32 b, $0, 0xffff0000;
                sub.f32 a, $2, a;
                sub.f32 b, $3, b;
                cvt.rn.bf16x2.f32 $1, b, a;
            }
            """,
            "=&r,=&r,r,r", [x], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def lo8_of(x, hi):
    """int8: how many steps of 2^-8 of hi's last bit x, in float32, lies beyond hi, its bfloat16."""
    if INTERPRETED:
        beyond = x.to(tl.int32, bitcast=True) - (hi.to(tl.int16, bitcast=True).to(tl.int32) << 16)
        return tl.minimum((beyond + 128) >> 8, 127).to(tl.int8)
    else:
        # Four numbers at a time: bits of x - hi, to the nearest step, packed with saturation.
        return tl.inline_asm_elementwise(
            """
            {
                .reg .b32 a, b, c, d;
                shl.b32 a, $5, 16;
                and.b32 b, $5, 0xffff0000;
                shl.b32 c, $6, 16;
                and.b32 d, $6, 0xffff0000;
                sub.s32 a, $1, a;
                sub.s32 b, $2, b;
                sub.s32 c, $3, c;
                sub.s32 d, $4, d;
                add.s32 a, a, 128;
                add.s32 b, b, 128;
                add.s32 c, c, 128;
                add.s32 d, d, 128;
                shr.s32 a, a, 8;
                shr.s32 b, b, 8;
                shr.s32 c, c, 8;
                shr.s32 d, d, 8;
                cvt.pack.sat.s8.s32.b32 c, d, c, 0;
                cvt.pack.sat.s8.s32.b32 $0, b, a, c;
            }
            """,
            "=r,r,r,r,r,r,r", [x, hi], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def joined(hi, lo8):
    """The float32 number of hi, bfloat16, and the eight bits after it."""
    if INTERPRETED:
        bits = (hi.to(tl.int16, bitcast=True).to(tl.int32) << 16) + (lo8.to(tl.int32) << 8)
        return bits.to(tl.float32, bitcast=True)
    else:
        # prmt moves byte i of lo8 to bits 8 to 15 and fills those above with its sign.
        return tl.inline_asm_elementwise(
            """
            {
                .reg .b32 a, b, c, d, x, y;
                prmt.b32 a, $6, 0, 0x8804;
                prmt.b32 b, $6, 0, 0x9914;
                prmt.b32 c, $6, 0, 0xaa24;
                prmt.b32 d, $6, 0, 0xbb34;
                and.b32 x, $4, 0xffff0000;
                and.b32 y, $5, 0xffff0000;
                mad.lo.u32 $0, $4, 65536, a;
                mad.lo.u32 $2, $5, 65536, c;
                add.s32 $1, x, b;
                add.s32 $3, y, d;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r,r", [hi, lo8], dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def lo_of(hi, lo8):
    """The operand lo of a pair that is kept as hi and lo8; bfloat16 holds it exactly."""
    if INTERPRETED:
        return cast(joined(hi, lo8) - hi.to(tl.float32), tl.bfloat16)
    else:
        return tl.inline_asm_elementwise(
            """
            {
                .reg .b32 a, b, c, d, w, x, y, z;
                shl.b32 w, $2, 16;
                and.b32 x, $2, 0xffff0000;
                shl.b32 y, $3, 16;
                and.b32 z, $3, 0xffff0000;
                prmt.b32 a, $4, 0, 0x8804;
                prmt.b32 b, $4, 0, 0x9914;
                prmt.b32 c, $4, 0, 0xaa24;
                prmt.b32 d, $4, 0, 0xbb34;
                add.s32 a, a, w;
                add.s32 b, b, x;
                add.s32 c, c, y;
                add.s32 d, d, z;
                sub.f32 a, a, w;
                sub.f32 b, b, x;
                sub.f32 c, c, y;
                sub.f32 d, d, z;
                cvt.rn.bf16x2.f32 $0, b, a;
                cvt.rn.bf16x2.f32 $1, d, c;
            }
            """,
            "=&r,=&r,r,r,r", [hi, lo8], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def through_registers(x):
    """x, an operand of 16 bits, as if computed.

    Where a loop loads ahead to shared memory, an operand of a product stays there. If registers read it as well,
    Triton 3.6 keeps one buffer too few: the next load overwrites what a running product reads.
    """
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)


@triton.jit
def dot(a, b, acc, WIDE: tl.constexpr):
    """acc + a b of operands."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif WIDE:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def fine_dot(x, b, acc, WIDE: tl.constexpr):
    """acc + x b with x in float32 and b an operand that is exact."""
    hi, lo = split(x, WIDE)
    acc = dot(hi, b, acc, WIDE)
    if not WIDE:
        acc = dot(lo, b, acc, WIDE)
    return acc


@triton.jit
def pair_dot(x, hi, lo, acc, WIDE: tl.constexpr):
    """acc + x (hi + lo) with x in float32; lo is not read if WIDE."""
    x_hi, x_lo = split(x, WIDE)
    acc = dot(x_hi, hi, acc, WIDE)
    if not WIDE:
        acc = dot(x_lo, hi, acc, WIDE)
        acc = dot(x_hi, lo, acc, WIDE)
    return acc


@triton.jit
def widened(x, WIDE: tl.constexpr):
    """An operand as float32, for use in a loop that it does not change in.

    Opaque to the compiler, which would else do this once before the loop and keep twice the registers.
    """
    if WIDE or INTERPRETED:
        return x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x],
            dtype=tl.float32, is_pure=False, pack=2,
        )  # fmt: skip


@triton.jit
def operand_product(x, operand, WIDE: tl.constexpr):
    """to_operand(x o operand); if not WIDE x is rounded first, and the product formed in pairs of 16 bits."""
    if WIDE or INTERPRETED:
        return to_operand(x * operand.to(tl.float32), WIDE)
    else:
        return to_operand(x, WIDE) * operand
