"""The solve of a chunk's ridge systems; forward and adjoint are this one kernel (paper, section 4.2).

Divided by the norm of its state, every token has the system (S^_c + a I) x_c = rhs_c, all eigenvalues in
[a, 1 + a]. For all C tokens of a chunk one product with their matrices is, with zeta_c = e^{G_c} / ||S_c||_F and
M_{c,j} = e^{G_c - G_j} beta_j^2 r_j^2 / ||S_c||_F for j <= c:

    X S^ = (zeta o X) S_0 + ((X K^T) o M) K

and one stage of n Chebyshev nodes (one vector, no momentum):  x <- x - tau_i (S^ x + a x - rhs). With CG
a stage is that of `conjugate_gradient.py`.

Stages refine: each later one solves for the residual of the sum so far. Within a stage products have operands of
16 bits, if not WIDE; the residual is formed from pairs hi + lo, as exactly as float32 sums allow. The sum so
far waits in memory, where the solution will be and as a pair like it, while a stage runs: the iteration needs
all registers.

Legend: C tokens of a chunk; D key dim, BD its power of two; S_0 [D, D] first state; K [C, D] keys as they came.
"""

import triton
import triton.language as tl
from torch import Tensor

from .. import config
from ..call import NO_PAIR, Call, Pair, Part, StatePairs
from ..launch import launch
from .arithmetic import dot, fine_dot, operand_product, split, to_operand, widened
from .common import (
    floored,
    head_and_chunk,
    key_weights,
    load_matrix,
    load_pairs,
    load_rows,
    load_scalars,
    log_decays,
    past_mask,
    store_pairs,
    store_scalars,
    sums_of_earlier,
)
from .conjugate_gradient import compiles_tolerance, conjugate_gradient_stage


@triton.jit
def _norms(
    K, K_lo, S, G, g_ptr, start, end, H, h, weight,
    C: tl.constexpr, BD: tl.constexpr, FROM_WIDE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """max(||S_c||_F, NORM_FLOOR) [C] of every token, 0 for 0. S_0 is the chunk's first state, zeta_c = e^{G_c} and
    w = beta^2 r^2. To the square a token adds products of its w k k^T, with itself and with the decayed state:

        ||S_c||_F^2 = zeta_c^2 ||S_0||_F^2 + sum_{i <= c} e^{2 (G_c - G_i)} added_i
        added_i = w_i (2 zeta_i k_i^T S_0 k_i + 2 sum_{j < i} e^{G_i - G_j} w_j (k_i^T k_j)^2 + w_i (k_i^T k_i)^2)

    Every term is at least zero, nothing cancels.
    """
    zeta = tl.exp(G)
    S_square = tl.sum(tl.sum(S.to(tl.float32) * S.to(tl.float32), 1), 0)
    keys_S = dot(K, S, tl.zeros([C, BD], tl.float32), WIDE)
    gram = dot(K, tl.trans(K), tl.zeros([C, C], tl.float32), WIDE)
    if FROM_WIDE:
        keys_S = dot(K_lo, S, keys_S, WIDE)
        quadratic = tl.sum(keys_S * (K.to(tl.float32) + K_lo.to(tl.float32)), 1)
        gram = dot(K_lo, tl.trans(K), gram, WIDE)
        gram = dot(K, tl.trans(K_lo), gram, WIDE)
    else:
        quadratic = tl.sum(keys_S * K.to(tl.float32), 1)
    c = tl.arange(0, C)
    counted = tl.where(c[:, None] == c[None, :], 1.0, 2.0) * weight[None, :]
    added = weight * (2.0 * zeta * quadratic + tl.sum(past_mask(G, C) * counted * gram * gram, 1))
    square = zeta * zeta * S_square + sums_of_earlier(added, 2.0, g_ptr, start, end, H, h, C)
    return floored(tl.sqrt(tl.maximum(square, 0.0)))


@triton.jit
def _residual(
    x, rhs_ptr, kk_hi_ptr, kk_lo_ptr, K, K_lo, S, G, inverse, weight, ridge_ratio,
    row, stop, rows_H, rows_h, rows_D, program, D,
    C: tl.constexpr, BD: tl.constexpr, HAS_RHS: tl.constexpr, FROM_WIDE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """S^ x + a x - rhs (without rhs unless HAS_RHS) as exactly as float32 sums allow, x [C, BD] in float32."""
    scores = fine_dot(x, tl.trans(K), tl.zeros([C, C], tl.float32), WIDE)
    if FROM_WIDE:
        scores = dot(to_operand(x, WIDE), tl.trans(K_lo), scores, WIDE)
    scores = scores * past_mask(G, C) * inverse[:, None] * weight[None, :]
    tl.debug_barrier()
    start = ridge_ratio * x
    if HAS_RHS:
        start -= load_rows(rhs_ptr, row, stop, rows_H, rows_h, rows_D, 0, C, BD).to(tl.float32)
    product = fine_dot(scores, K, start, WIDE)
    if FROM_WIDE:
        product = dot(to_operand(scores, WIDE), K_lo, product, WIDE)
    hi, lo = split(x * (tl.exp(G) * inverse)[:, None], WIDE)
    product = dot(hi, S, product, WIDE)
    if not WIDE:
        product = dot(lo, S, product, WIDE)
        tl.debug_barrier()
        if FROM_WIDE:
            S_lo = split(load_matrix(kk_hi_ptr, program, D, D, 0, 0, BD, BD), WIDE)[1]
        else:
            S_lo = load_matrix(kk_lo_ptr, program, D, D, 0, 0, BD, BD)
        product = dot(hi, S_lo, product, WIDE)
    return product


@triton.jit(do_not_specialize=["first_chunk"])
def solve_chunks(
    rhs_ptr, x_hi_ptr, x_lo_ptr,  # right-hand sides, out: solutions (hi, lo of no use if WIDE)
    # these are [tokens, H, D], or [chunks, H, C, BD] if ADJOINT
    k_ptr, g_ptr, rhs_scale_ptr, beta_ptr, key_scale_ptr,  # [tokens, Hk, D], [tokens, H], key_scale [tokens, Hk]
    norm_ptr,  # [tokens, H] float32, out unless ADJOINT
    kk_hi_ptr, kk_lo_ptr,  # first states, [chunks, H, D, D], lo bfloat16
    y_hi_ptr, y_lo_ptr, inner_yAx_ptr,  # if ADJOINT: y [tokens, H, D], and out: <A x, y> [tokens, H] float32
    tau_ptr,  # step sizes of all stages, float32; none if CG
    stage_ptr,  # [STAGES + 1] int32, where each stage starts in them
    chunk_ptr, ridge_ratio, tolerance, first_chunk, H, Hk, D: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, ADJOINT: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr,
    FROM_WIDE: tl.constexpr, WIDE: tl.constexpr, CG: tl.constexpr, TOLERANCE: tl.constexpr,
):  # fmt: skip
    """x_c = A_c^{-1} rhs_scale_c rhs_c with A_c = S_c + a ||S_c||_F I, for all tokens of a chunk; 0 where S_c is.

    ADJOINT, rhs is dy, rhs_scale alpha, and y the solution of the forward pass.

    FROM_WIDE: with the arithmetic of bfloat16, from float16 keys, which become pairs, and float32 states; x and y
    are float32.
    """
    program = tl.program_id(0).to(tl.int64)
    h, start, end = head_and_chunk(program, chunk_ptr, first_chunk, H)
    if start >= end:
        return
    STORED_WIDE: tl.constexpr = WIDE or FROM_WIDE
    hk = h // (H // Hk)
    row, stop, rows_H, rows_h, rows_D = start, end, H, h, D
    if ADJOINT:
        row, stop, rows_H, rows_h, rows_D = program * C, program * C + C, 1, program * 0, BD

    keys = load_rows(k_ptr, start, end, Hk, hk, D, 0, C, BD)
    K = to_operand(keys.to(tl.float32) if WIDE else keys, WIDE)  # float16 would be widened in every product
    K_lo = K
    S = to_operand(load_matrix(kk_hi_ptr, program, D, D, 0, 0, BD, BD), WIDE)
    if FROM_WIDE:
        K, K_lo = split(keys.to(tl.float32), WIDE)
    Kt = tl.trans(K)
    G = log_decays(g_ptr, start, end, H, h, C)
    beta, scale = key_weights(beta_ptr, key_scale_ptr, start, end, H, h, Hk, hk, C, HAS_BETA, NORMALIZE)
    weight = beta * beta * scale * scale
    if ADJOINT:
        norm = load_scalars(norm_ptr, start, end, H, h, C)
    else:
        norm = _norms(K, K_lo, S, G, g_ptr, start, end, H, h, weight, C, BD, FROM_WIDE, WIDE)
        store_scalars(norm_ptr, norm, start, end, H, h, C)
    inverse = tl.where(norm > 0.0, 1.0 / norm, 0.0)
    zeta = tl.exp(G) * inverse
    operand_M = to_operand(past_mask(G, C) * inverse[:, None] * weight[None, :], WIDE)
    tl.debug_barrier()
    rhs = load_rows(rhs_ptr, row, stop, rows_H, rows_h, rows_D, 0, C, BD).to(tl.float32)
    # Added to a product of nothing, the right-hand side comes into the registers where products want it.
    product = dot(tl.zeros_like(K), S, -rhs, WIDE)

    x = tl.zeros([C, BD], tl.float32)
    for stage in tl.static_range(STAGES):
        if stage > 0:
            product = _residual(
                x, rhs_ptr, kk_hi_ptr, kk_lo_ptr, K, K_lo, S, G, inverse, weight, ridge_ratio,
                row, stop, rows_H, rows_h, rows_D, program, D, C, BD, True, FROM_WIDE, WIDE,
            )  # fmt: skip
        first, last = tl.load(stage_ptr + stage), tl.load(stage_ptr + stage + 1)
        if CG:
            x = conjugate_gradient_stage(
                -product, K, Kt, S, zeta, operand_M, ridge_ratio, last - first, tolerance, C, BD, TOLERANCE, WIDE
            )
        else:
            target = to_operand(product, WIDE)
            x = -tl.load(tau_ptr + first) * widened(target, WIDE)
            for node in range(first + 1, last):
                tau = tl.load(tau_ptr + node)
                scores = dot(to_operand(x, WIDE), Kt, tl.zeros([C, C], tl.float32), WIDE)
                product = dot(operand_product(scores, operand_M, WIDE), K, widened(target, WIDE), WIDE)
                product = dot(to_operand(x * zeta[:, None], WIDE), S, product, WIDE)
                x = x * (1.0 - tau * ridge_ratio) - tau * product
        if stage > 0:
            tl.debug_barrier()
            x += load_pairs(x_hi_ptr, x_lo_ptr, row, stop, rows_H, rows_h, rows_D, 0, C, BD, STORED_WIDE)
        factor = tl.full([C], 1.0, tl.float32)
        if stage == STAGES - 1:
            factor = inverse
            if HAS_SCALE:
                factor *= load_scalars(rhs_scale_ptr, start, end, H, h, C)
        store_pairs(x_hi_ptr, x_lo_ptr, x * factor[:, None], row, stop, rows_H, rows_h, rows_D, C, BD, STORED_WIDE)
    if ADJOINT:
        product = _residual(
            x, rhs_ptr, kk_hi_ptr, kk_lo_ptr, K, K_lo, S, G, inverse, weight, ridge_ratio,
            row, stop, rows_H, rows_h, rows_D, program, D, C, BD, False, FROM_WIDE, WIDE,
        )  # fmt: skip
        tl.debug_barrier()
        y = load_pairs(y_hi_ptr, y_lo_ptr, start, end, H, h, D, 0, C, BD, STORED_WIDE)
        store_scalars(inner_yAx_ptr, tl.sum(product * y, 1) * factor * norm, start, end, H, h, C)


def launch_solve_chunks(
    call: Call, part: Part, *, rhs: Tensor, rhs_scale: Tensor | None, key_scale: Tensor | None, x: Pair,
    norm: Tensor | None, states: StatePairs, y: Pair = NO_PAIR, inner_yAx: Tensor | None = None,
) -> None:  # fmt: skip
    """x = A^{-1} rhs_scale rhs, as a pair, and norm; with y the adjoint solve, which reads norm.

    Rows are those of tokens, [B, T, H, D], or with y those of the part, [chunks, H, C, BD].
    """
    if call.tolerance is not None and not compiles_tolerance(config.capability(call.device)):
        raise ValueError(
            f"tolerance is {call.tolerance}; expected None on this GPU with Triton {triton.__version__}, which "
            "cannot compile it; Triton 3.9 can"
        )
    launch(solve_chunks, part.programs,
        rhs_ptr=rhs, x_hi_ptr=x.hi, x_lo_ptr=x.lo,
        k_ptr=call.k, g_ptr=call.g, rhs_scale_ptr=rhs_scale, beta_ptr=call.beta, key_scale_ptr=key_scale,
        norm_ptr=norm, kk_hi_ptr=states.kk.hi, kk_lo_ptr=states.kk.lo,
        y_hi_ptr=y.hi, y_lo_ptr=y.lo, inner_yAx_ptr=inner_yAx,
        tau_ptr=call.taus, stage_ptr=call.stage_starts, chunk_ptr=call.chunks,
        ridge_ratio=call.ridge_ratio, tolerance=call.tolerance or 0.0, first_chunk=part.first,
        H=call.H, Hk=call.Hk, D=call.D, C=call.C, BD=call.BD,
        STAGES=call.solver_stages, ADJOINT=y is not NO_PAIR, HAS_SCALE=rhs_scale is not None,
        HAS_BETA=call.has_beta, NORMALIZE=call.normalize, CG=call.cg,
        FROM_WIDE=call.config.narrow_solve, WIDE=call.wide and not call.config.narrow_solve,
        TOLERANCE=call.tolerance is not None, **call.config.solve,
    )  # fmt: skip
