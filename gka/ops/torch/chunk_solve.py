"""The solve of a chunk's tokens as a function with all derivatives: implicit, of any order, in both modes.

With A_c = S_c + a ||S_c||_F I, symmetric, and x_c = A_c^{-1} q_c for every token c of a chunk (`chunk_math`):

    X A = (X S_0) o zeta + ((X K^T) o Mb) K + a n o X          n_c = max(||S_c||_F, NORM_FLOOR)
    forward mode    x' = A^{-1} (q' - A' x)                    the tangent solves the same systems
    backward        z = A^{-1} dx,  dq = z, and -<z, A x> is differentiated at S_0, K, Mb, zeta and n

Both are made of this function and of products, so they have derivatives in turn (paper, section 4.3).

Legend: as in `chunk_math`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..plan import Plan
from ..solvers import inverse_or_zero
from ..transforms import batch_in_front
from .chunk_math import StateProduct, cross, heads, mix

TENSORS = 6  # q, K, S_0, Mb, zeta, norm


class _ChunkSolve(torch.autograd.Function):
    """X from q, K, S_0, Mb, zeta, norm, ridge_ratio, plan."""

    @staticmethod
    def forward(  # type: ignore[override]
        Q: Tensor,
        K: Tensor,
        S_0: Tensor,
        Mb: Tensor,
        zeta: Tensor,
        norm: Tensor,
        ridge_ratio: float,
        plan: Plan,
    ) -> Tensor:
        inverse_norm = inverse_or_zero(norm)
        matvec = StateProduct(K, S_0, Mb, zeta, inverse_norm, Q.dtype)
        return plan.solve(matvec, Q * inverse_norm.unsqueeze(-1), ridge_ratio)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:TENSORS], output)
        ctx.save_for_forward(*inputs[1:TENSORS], output)
        ctx.numbers = inputs[TENSORS:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        K, S_0, Mb, zeta, norm, X = ctx.saved_tensors
        Z = chunk_solve(gradients[0], K, S_0, Mb, zeta, norm, *ctx.numbers)
        XK, ZK = cross(X, K), cross(Z, K)
        dK = heads((ZK * Mb).transpose(-1, -2), X) + heads((XK * Mb).transpose(-1, -2), Z)
        dS_0 = heads((zeta.unsqueeze(-1) * X).transpose(-1, -2), Z)
        dzeta = (heads(X, S_0) * Z).sum(-1)
        dnorm = ctx.numbers[0] * (Z * X).sum(-1)
        return Z, -dK.sum(1), -dS_0, -XK * ZK, -dzeta, -dnorm, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        K, S_0, Mb, zeta, norm, X = ctx.saved_tensors
        inputs = (X, K, S_0, Mb, zeta, norm)
        dQ, dK, dS_0, dMb, dzeta, dnorm = (
            torch.zeros_like(x) if tangent is None else tangent
            for x, tangent in zip(inputs, tangents[:TENSORS], strict=True)
        )
        XK = cross(X, K)
        change = heads(X, dS_0) * zeta.unsqueeze(-1) + heads(X, S_0) * dzeta.unsqueeze(-1)
        change = change + mix(cross(X, dK) * Mb + XK * dMb, K) + mix(XK * Mb, dK)
        change = change + ctx.numbers[0] * dnorm.unsqueeze(-1) * X
        return chunk_solve(dQ - change, K, S_0, Mb, zeta, norm, *ctx.numbers)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        tensors = batch_in_front(info.batch_size, in_dims[:TENSORS], inputs[:TENSORS])
        X = chunk_solve(*(x.flatten(0, 1) for x in tensors), *inputs[TENSORS:])
        return X.unflatten(0, (info.batch_size, -1)), 0


def chunk_solve(Q: Tensor, *others: Any) -> Tensor:
    """X [b, R, C, D] with X_c = A_c^{-1} Q_c; 0, without a derivative, where S_c = 0.

    Args:
        Q: [b, R, C, D], float32 or float64 as all tensors.
        *others: K [b, C, D]; S_0 [b, R, D, D]; Mb [b, R, C, C]; zeta and norm [b, R, C],
            max(||S_c||_F, NORM_FLOOR) or 0; ridge_ratio; plan.
    """
    X: Tensor = _ChunkSolve.apply(Q, *others)  # type: ignore[no-untyped-call]
    return X
