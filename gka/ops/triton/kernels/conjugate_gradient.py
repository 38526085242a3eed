"""One stage of conjugate gradient for all tokens of a chunk, in registers (`gka.ops.conjugate_gradient`).

With the product of `solve.py`, X A = (zeta o X) S_0 + ((X K^T) o M) K + a X, every row c of the chunk iterates

    rate = <r, r> / <p, A p>      x <- x + rate p      r' = r - rate A p      p <- r' + (<r', r'> / <r, r>) p

r is float32. If not WIDE, p and x are bfloat16, because r, x, p and A p must fit into registers. x of a stage may
be rounded: the next residual is formed from what is stored. A right-hand side below SMALLEST counts as zero.

A number of p and the one of x share 32 bits, p above: as tensors of 16 bits, which the compiler carries through a
loop one number a register, they would take twice the registers. Read as float32 such a word is p to 2^-8 of it.
That is enough, and saves an instruction, where products are rounded alike: in a X, and in <p, A p>.

Legend: C tokens of a chunk; D key dim, BD its power of two.
"""

import triton
import triton.language as tl

from .arithmetic import INTERPRETED, dot, operand_product, to_operand

SMALLEST = tl.constexpr(1e-36)  # its reciprocal is finite
NOTHING = tl.constexpr(2.0**-92)  # eps^4 of float32: a residual of eps^2, relative to the right-hand side, is none


def compiles_tolerance(capability: tuple[int, int]) -> bool:
    """Whether Triton can compile a stage that ends by a tolerance: 3.6 fails for Blackwell, 3.9 does not."""
    return capability[0] < 10 or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


@triton.jit
def _held(p, x, WIDE: tl.constexpr):
    """p and x, float32, as they are kept: as words if not WIDE, and then the second is not used."""
    if WIDE:
        return p, x
    elif INTERPRETED:
        above = to_operand(p, WIDE).to(tl.float32).to(tl.uint32, bitcast=True)
        below = to_operand(x, WIDE).to(tl.float32).to(tl.uint32, bitcast=True)
        return (above | (below >> 16)).to(tl.float32, bitcast=True), 0
    else:
        words = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,r,r", [p, x], dtype=tl.float32, is_pure=True, pack=1
        )
        return words, 0


@triton.jit
def _p(held, WIDE: tl.constexpr):
    """p in float32, exactly."""
    if WIDE:
        return held
    else:
        return (held.to(tl.uint32, bitcast=True) >> 16 << 16).to(tl.float32, bitcast=True)


@triton.jit
def _operand_p(held, WIDE: tl.constexpr):
    """p as an operand of a product."""
    if WIDE:
        return held
    elif INTERPRETED:
        return to_operand(_p(held, WIDE), WIDE)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [held], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def _weighted_p(held, operand_zeta, WIDE: tl.constexpr):
    """zeta o p as an operand. Not of `_operand_p`: p would wait for it in 32 registers."""
    if WIDE or INTERPRETED:
        return to_operand(_p(held, WIDE) * operand_zeta.to(tl.float32), WIDE)
    else:
        p = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $1, 0x3276;", "=r,r,r", [held], dtype=tl.bfloat16, is_pure=True, pack=2
        )
        return p * operand_zeta


@triton.jit
def _x(held, x, WIDE: tl.constexpr):
    """x in float32."""
    if WIDE:
        return x
    else:
        return (held.to(tl.uint32, bitcast=True) << 16).to(tl.float32, bitcast=True)


@triton.jit
def conjugate_gradient_stage(
    r, K, Kt, S, zeta, operand_M, ridge_ratio, most, tolerance,
    C: tl.constexpr, BD: tl.constexpr, TOLERANCE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x [C, BD] float32 from the right-hand sides r [C, BD] float32, by `most` products.

    With TOLERANCE by fewer, if the residuals of all rows are at most `tolerance` times what they were.
    """
    size = tl.max(tl.abs(r), 1)
    size = tl.where(size > SMALLEST, size, 1.0)
    r = r * (1.0 / size)[:, None]
    held, x = _held(r, tl.zeros_like(r), WIDE)
    energy = tl.sum(r * r, 1)
    enough = tolerance * tolerance * energy
    operand_zeta = to_operand(zeta, WIDE)[:, None]
    n, last = 0, most
    while n < last:
        scores = dot(_operand_p(held, WIDE), Kt, tl.zeros([C, C], tl.float32), WIDE)
        product = dot(operand_product(scores, operand_M, WIDE), K, ridge_ratio * held, WIDE)
        product = dot(_weighted_p(held, operand_zeta, WIDE), S, product, WIDE)
        curvature = tl.sum(held * product, 1)
        rate = tl.where((energy > NOTHING) & (curvature > 0.0), energy / curvature, 0.0)[:, None]
        r -= rate * product
        new_energy = tl.sum(r * r, 1)
        carried = tl.where(energy > NOTHING, new_energy / energy, 0.0)[:, None]
        p = _p(held, WIDE)
        held, x = _held(r + carried * p, _x(held, x, WIDE) + rate * p, WIDE)
        energy = new_energy
        n += 1
        if TOLERANCE:
            left = tl.max((energy > enough).to(tl.int32), 0)
            last = tl.where(left > 0, most, 0)
    return _x(held, x, WIDE) * size[:, None]
