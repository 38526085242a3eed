"""RMSNorm of rows times SiLU of a gate, forward and backward.

    r = 1 / sqrt(mean_v x_v^2 + eps)    n_v = r x_v        s_v = 1 / (1 + e^{-z_v})    y_v = n_v w_v z_v s_v
    u_v  = dy_v z_v s_v                                    dw_v = sum over rows of u_v n_v
    dx_v = r (u_v w_v - n_v mean_j u_j w_j n_j)            dz_v = dy_v n_v w_v s_v (1 + z_v (1 - s_v))

A program holds R whole rows at once, so that every number comes from memory once; r and s are computed anew in the
backward pass. There a program takes every P-th block of rows, adds up its part of dw in registers, for each row
of a block apart, and sums over these rows once, at its end. All arithmetic is float32.

Legend: x, z (the gate), y [N, V]; w [V]; v, j columns; R rows at a time; BV power of two, at least V; P programs.
"""

import triton
import triton.language as tl

from .arithmetic import cast


@triton.jit
def _block_of(block, N, V: tl.constexpr, R: tl.constexpr, BV: tl.constexpr):
    """Of R rows: where the first starts, its numbers' offsets from there, and which of them there are, [R, BV]."""
    r, v = tl.arange(0, R)[:, None], tl.arange(0, BV)[None, :]
    first = block.to(tl.int64) * R
    return first * V, r * V + v, (r < tl.minimum(N - first, R).to(tl.int32)) & (v < V)


@triton.jit
def _load(ptr, start, offsets, inside):
    return tl.load(ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, x, start, offsets, inside):
    tl.store(ptr + start + offsets, cast(x, ptr.dtype.element_ty), mask=inside)


@triton.jit
def _mean(x, V: tl.constexpr):
    """Over V, [R, 1]."""
    return (tl.sum(x, 1) * (1.0 / V))[:, None]


@triton.jit
def _weight(weight_ptr, V: tl.constexpr, R: tl.constexpr, BV: tl.constexpr):
    """w for each of R rows, [R, BV], or for all of them with R = 1."""
    v = tl.broadcast_to(tl.arange(0, BV)[None, :], [R, BV])
    return tl.load(weight_ptr + v, mask=v < V, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def gated_norm(
    x_ptr, gate_ptr, weight_ptr, y_ptr,  # [N, V], [N, V], [V], out: [N, V]
    N, eps,
    V: tl.constexpr, R: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    start, offsets, inside = _block_of(tl.program_id(0), N, V, R, BV)
    x = _load(x_ptr, start, offsets, inside)
    z = _load(gate_ptr, start, offsets, inside)
    n = x * tl.rsqrt(_mean(x * x, V) + eps)
    _store(y_ptr, n * _weight(weight_ptr, V, R, BV) * (z * tl.sigmoid(z)), start, offsets, inside)


@triton.jit(do_not_specialize=["N"])
def gated_norm_backward(
    dy_ptr, x_ptr, gate_ptr, weight_ptr,  # [N, V] three times, [V]
    dx_ptr, dgate_ptr, parts_ptr,  # out: [N, V] twice, [P, V] float32, the gradient of the weight by programs
    N, eps,
    V: tl.constexpr, R: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    w = _weight(weight_ptr, V, 1, BV)
    dw = tl.zeros([R, BV], tl.float32)
    for done in range(0, tl.cdiv(N, R), tl.num_programs(0)):  # blocks; in the last round some of none
        start, offsets, inside = _block_of(tl.program_id(0) + done, N, V, R, BV)
        x = _load(x_ptr, start, offsets, inside)
        z = _load(gate_ptr, start, offsets, inside)
        dy = _load(dy_ptr, start, offsets, inside)
        r = tl.rsqrt(_mean(x * x, V) + eps)
        n = x * r
        s = tl.sigmoid(z)
        u = dy * (z * s)
        dw += u * n
        dn = u * w
        _store(dx_ptr, r * (dn - n * _mean(dn * n, V)), start, offsets, inside)
        _store(dgate_ptr, dy * n * w * (s + z * (s - s * s)), start, offsets, inside)
    v = tl.arange(0, BV)
    tl.store(parts_ptr + tl.program_id(0) * V + v, tl.sum(dw, 0), mask=v < V)
