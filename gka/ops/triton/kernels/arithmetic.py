"""Arithmetic of the kernels: operands of products, numbers as pairs, products more exact than 16 bits.

Two arithmetics, chosen by the constexpr WIDE:
    WIDE = False  (bfloat16 inputs): operands of products are bfloat16, sums are float32. What must be exact, a
                  state, an iterate or a state's gradient, is a pair hi + lo of bfloat16, and a product of pairs is
                  three products. In memory a pair takes three bytes: hi, and as int8 (`lo8`) the eight bits of the
                  float32 number that follow those of hi.
    WIDE = True   (float32 and float16 inputs): operands are float32, products three-part TF32. What came in
                  float16 stays so as an operand, but in the solve: TF32 holds it exactly, so a product needs two
                  parts, or with two such operands is one product of float16.
"""

import os

import triton
import triton.language as tl

# Triton's interpreter multiplies bfloat16 operands by their bits: there they are widened first.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


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
        return x if x.dtype == tl.float16 else x.to(tl.float32)
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
def _tf32_parts(x):
    """x in float32 as two numbers of TF32: its first 11 bits, and the rest."""
    hi = (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return hi, x - hi


@triton.jit
def dot(a, b, acc, WIDE: tl.constexpr):
    """acc + a b of operands."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif WIDE and a.dtype == tl.float32 and b.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    elif WIDE and a.dtype == tl.float32:
        hi, lo = _tf32_parts(a)
        acc = tl.dot(lo, b.to(tl.float32), acc, input_precision="tf32")
        return tl.dot(hi, b.to(tl.float32), acc, input_precision="tf32")
    elif WIDE and b.dtype == tl.float32:
        hi, lo = _tf32_parts(b)
        acc = tl.dot(a.to(tl.float32), lo, acc, input_precision="tf32")
        return tl.dot(a.to(tl.float32), hi, acc, input_precision="tf32")
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
