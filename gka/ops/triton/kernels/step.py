"""One token of decoding: decay, update, solve and readout of a sequence and head, states read and written once.

    S_kk <- e^g S_kk + beta^2 k k^T        S_kv <- e^g S_kv + beta^2 k v^T
    x = (S_kk + a ||S_kk||_F I)^{-1} q     o = scale * (q + alpha (x - q))^T S_kv

A program holds S_kk in registers while it solves: one stage of n Chebyshev nodes after the other,
x <- x - tau_i (S^ x + a x - rhs) with S^ = S_kk / ||S_kk||_F, in float32, every later stage for the residual of
the sum so far (paper, section 4.2); with CG stages of conjugate gradient (`gka.ops.conjugate_gradient`). What is
solved and read is the state before it is rounded for storing.

A product waits for its slowest exchange between threads, and 30 products follow each other. S is symmetric, so
y_j = sum_i S_ij x_i may sum over rows: a thread has R rows i of a few columns j, sums them alone, and only the
sums of G groups of R rows meet, once. Rows are loaded in the order that gives a group to neighbouring threads: row
t of the tensor in registers is row (t mod G) R + t / G of the state.

The states may be rows of a pool: of sequence b that with the number index[b]. With an index below 0 a program
writes zeros to o and touches no state.

Legend: B sequences, N rows of a pool, H query heads, Hk key/value heads; D key dim, V value dim, BD and BV their
blocks; G groups of R = BD / G rows.
"""

import triton
import triton.language as tl

from .arithmetic import cast
from .common import floored
from .conjugate_gradient import NOTHING, SMALLEST


@triton.jit
def _load_vector(ptr, dim: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] in float32 from ptr; zero past dim."""
    d = tl.arange(0, BLOCK)
    return tl.load(ptr + d, mask=d < dim, other=0.0).to(tl.float32)


@triton.jit
def _places(ptr, start, first, rows: tl.constexpr, columns: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
            G: tl.constexpr):  # fmt: skip
    """Addresses [BR, BC] of a state's columns from `first`, rows grouped, and which exist."""
    t = tl.arange(0, BR)
    i = (t % G) * (BR // G) + t // G
    j = first + tl.arange(0, BC)
    place = ptr + start + (i[:, None] * columns + j[None, :])
    return place, (i < rows)[:, None] & (j < columns)[None, :]


@triton.jit
def _start(program, pool_row, row_stride, H, size: tl.constexpr, POOL: tl.constexpr):
    """Where the state of a program begins, int64: with POOL in a row of the pool, else they lie without gaps."""
    if POOL:
        return pool_row.to(tl.int64) * row_stride + (program % H) * size
    return program.to(tl.int64) * size


@triton.jit
def _by_rows(x, G: tl.constexpr):
    """x [BR] as [R, G], as the rows of a state are."""
    return tl.trans(tl.reshape(x, [G, x.shape[0] // G]))


@triton.jit
def _decay_parts(g):
    """(kept, rate): e^g S = kept S + rate S, for a small g with kept = 1 and rate = e^g - 1.

    e^g alone would be rounded, for a constant g the same way at every token (`gka.ops.torch.step._decay_parts`).
    """
    series = 1.0 + g / 4.0 * (1.0 + g / 5.0 * (1.0 + g / 6.0 * (1.0 + g / 7.0)))
    near = g * (1.0 + g / 2.0 * (1.0 + g / 3.0 * series))  # e^g - 1, to 1e-7 of it where it is taken
    small = g > -0.25
    return tl.where(small, 1.0, 0.0), tl.where(small, near, tl.exp(g))


@triton.jit
def _updated(S, kept, rate, weighted_k, row, G: tl.constexpr):
    """(kept + rate) S + weighted_k row^T in float32, [BR, BC] -> [R, G, BC]."""
    BR: tl.constexpr = S.shape[0]
    BC: tl.constexpr = S.shape[1]
    S = tl.reshape(S.to(tl.float32), [BR // G, G, BC])
    return kept * S + (rate * S + _by_rows(weighted_k, G)[:, :, None] * row[None, None, :])


@triton.jit
def _store_state(place, S, inside):
    BR: tl.constexpr = S.shape[0] * S.shape[1]
    BC: tl.constexpr = S.shape[2]
    tl.store(place, cast(tl.reshape(S, [BR, BC]), place.dtype.element_ty), mask=inside)


@triton.jit
def _store_zeros(ptr, dim: tl.constexpr, BLOCK: tl.constexpr):
    for block in tl.static_range((dim + BLOCK - 1) // BLOCK):
        d = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(ptr + d, tl.zeros([BLOCK], ptr.dtype.element_ty), mask=d < dim)


@triton.jit
def _times(x, S, G: tl.constexpr, LOG_G: tl.constexpr):
    """x^T S [BC] of x [BR] and S [R, G, BC].

    Halving the groups by `split` puts those of a column into one thread, with one exchange; a reduction would
    take two.
    """
    BC: tl.constexpr = S.shape[2]
    sums = tl.trans(tl.sum(S * _by_rows(x, G)[:, :, None], 0))
    for level in tl.static_range(LOG_G):
        even, odd = tl.split(tl.reshape(sums, [BC, G >> (level + 1), 2]))
        sums = even + odd
    return tl.reshape(sums, [BC])


@triton.jit
def _by_nodes(S, target, inverse, tau_ptr, ridge_ratio, nodes, G: tl.constexpr, LOG_G: tl.constexpr):
    """x [BD] of (S inverse + a) x = target by Chebyshev nodes, from their step sizes [nodes + 1]."""
    x = tl.load(tau_ptr) * target
    solution = tl.zeros_like(x)
    tau = tl.load(tau_ptr + 1)
    node = 1
    while node < nodes:
        next_tau = tl.load(tau_ptr + node + 1)  # before the product, that nothing waits for it
        residual = target - _times(x, S, G, LOG_G) * inverse - ridge_ratio * x
        later_stage = tau < 0.0
        target = tl.where(later_stage, residual, target)
        solution += tl.where(later_stage, x, 0.0)
        x = tl.where(later_stage, 0.0, x) + tl.abs(tau) * residual
        tau = next_tau
        node += 1
    return solution + x


@triton.jit
def _by_conjugate_gradient(S, target, inverse, end_ptr, ridge_ratio, tolerance, products,
                           G: tl.constexpr, LOG_G: tl.constexpr, TOLERANCE: tl.constexpr):  # fmt: skip
    """x [BD] of (S inverse + a) x = target, from the end of the stage of each product [products].

    The end of a stage is the product that forms the residual for the next one, with x in place of p.
    """
    size = tl.max(tl.abs(target), 0)
    size = tl.where(size > SMALLEST, size, 1.0)
    target = target / size
    r, p, x, solution = target, target, tl.zeros_like(target), tl.zeros_like(target)
    energy = tl.sum(r * r, 0)
    enough = tolerance * tolerance * energy
    n = 0
    while n < products:
        end = tl.load(end_ptr + n)
        at_end = end == n
        factor = tl.where(at_end, x, p)
        product = _times(factor, S, G, LOG_G) * inverse + ridge_ratio * factor
        curvature = tl.sum(p * product, 0)
        going = (energy > NOTHING) & (curvature > 0.0) & (end > n)
        rate = tl.where(going, energy / curvature, 0.0)
        r = tl.where(at_end, target - product, r - rate * product)
        target = tl.where(at_end, r, target)
        solution += tl.where(at_end, x, 0.0)
        x = tl.where(at_end, 0.0, x + rate * p)
        new_energy = tl.sum(r * r, 0)
        p = r + tl.where(going, new_energy / energy, 0.0) * p
        energy = new_energy
        enough = tl.where(at_end, tolerance * tolerance * energy, enough)
        n += 1
        if TOLERANCE:
            n = tl.where((energy <= enough) & (end >= n), end, n)
    return (solution + x) * size


@triton.jit
def step_token(
    q_ptr, k_ptr, v_ptr, g_ptr, alpha_ptr, beta_ptr,  # [B, H, D], [B, Hk, D], [B, Hk, V], [B, H] three times
    q_stride, k_stride, v_stride,  # elements from one sequence to the next
    kk_ptr, kv_ptr,  # states so far, [B, H, D, D] and [B, H, D, V]; with POOL [N, H, D, D] and [N, H, D, V]
    new_kk_ptr, new_kv_ptr, o_ptr,  # out: new states, maybe those so far; [B, H, V]
    steps_ptr,  # nodes: [steps + 1] float32, step sizes of all stages, negative where a later stage starts
    # CG: [steps] int32, the end of the stage of each product
    index_ptr,  # with POOL: [B] int32 or int64, the row of the pool of each sequence, below 0 for padding
    kk_stride, kv_stride,  # with POOL: elements from one row of the pool to the next
    scale, ridge_ratio, tolerance, steps, H, Hk,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    G_KK: tl.constexpr, LOG_KK: tl.constexpr, G_KV: tl.constexpr, LOG_KV: tl.constexpr,
    SOLVE: tl.constexpr, CG: tl.constexpr, TOLERANCE: tl.constexpr,
    HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """The step of one sequence and head. Without SOLVE nothing is solved, y = q, and there is no S_kk."""
    program = tl.program_id(0)
    pool_row = program
    if POOL:
        pool_row = tl.load(index_ptr + program // H)
        if pool_row < 0:
            _store_zeros(o_ptr + program.to(tl.int64) * V, V, BV)
            return
    sequence, head = (program // H).to(tl.int64), program % H
    kv_head = head // (H // Hk)
    if SOLVE:  # first, what takes longest; the barrier keeps it there
        kk_start = _start(program, pool_row, kk_stride, H, D * D, POOL)
        place, inside = _places(kk_ptr, kk_start, 0, D, D, BD, BD, G_KK)
        S = tl.load(place, mask=inside, other=0.0)
        tl.debug_barrier()
    q = _load_vector(q_ptr + sequence * q_stride + head * D, D, BD)
    k = _load_vector(k_ptr + sequence * k_stride + kv_head * D, D, BD)
    kept, rate = _decay_parts(tl.load(g_ptr + program).to(tl.float32))
    if NORMALIZE:
        q = q / (tl.sqrt(tl.sum(q * q, 0)) + 1e-6)
        k = k / (tl.sqrt(tl.sum(k * k, 0)) + 1e-6)
    weighted = k
    if HAS_BETA:
        beta = tl.load(beta_ptr + program).to(tl.float32)
        weighted = k * (beta * beta)

    y = q
    if SOLVE:
        S = _updated(S, kept, rate, weighted, k, G_KK)
        place, inside = _places(new_kk_ptr, kk_start, 0, D, D, BD, BD, G_KK)
        _store_state(place, S, inside)
        norm = floored(tl.sqrt(tl.sum(tl.sum(S * S, 0))))
        inverse = tl.where(norm > 0.0, 1.0 / norm, 0.0)
        if CG:
            solution = _by_conjugate_gradient(
                S, q * inverse, inverse, steps_ptr, ridge_ratio, tolerance, steps, G_KK, LOG_KK, TOLERANCE
            )
        else:
            solution = _by_nodes(S, q * inverse, inverse, steps_ptr, ridge_ratio, steps, G_KK, LOG_KK)
        y = solution
        if HAS_ALPHA:
            y = q + tl.load(alpha_ptr + program).to(tl.float32) * (solution - q)

    kv_start = _start(program, pool_row, kv_stride, H, D * V, POOL)
    for block in tl.static_range((V + BV - 1) // BV):
        j = block * BV + tl.arange(0, BV)
        v = tl.load(v_ptr + sequence * v_stride + kv_head * V + j, mask=j < V, other=0.0).to(tl.float32)
        place, inside = _places(kv_ptr, kv_start, block * BV, D, V, BD, BV, G_KV)
        S = _updated(tl.load(place, mask=inside, other=0.0), kept, rate, weighted, v, G_KV)
        place, inside = _places(new_kv_ptr, kv_start, block * BV, D, V, BD, BV, G_KV)
        _store_state(place, S, inside)
        o = scale * _times(y, S, G_KV, LOG_KV)
        tl.store(o_ptr + program.to(tl.int64) * V + j, cast(o, o_ptr.dtype.element_ty), mask=j < V)
