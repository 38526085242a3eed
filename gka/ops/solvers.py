"""Solvers of (S + lambda I) x = q for a symmetric positive semidefinite S, with lambda = a ||S||_F.

Divided by ||S||_F the system is (S_hat + a I) x = q_hat, with ||S_hat||_F = 1 and all eigenvalues in
[a, 1 + a]. So the coefficients of every iteration are scalars that all tokens share, and the condition
number is at most kappa = (1 + a) / a (paper, section 4.2). A norm below NORM_FLOOR counts as NORM_FLOOR, here
and in lambda: such a state has faded.

    Chebyshev, three-term (paper, algorithm 1):
        x_0 = 2 q / (L + mu),  omega_0 = 2,  rho = (L - mu) / (L + mu) = 1 / (1 + 2a)
        omega_i = 4 / (4 - rho^2 omega_{i-1})
        x_i = x_{i-1} - (2 omega_i / (L + mu)) (A x_{i-1} - q) + (omega_i - 1) (x_{i-1} - x_{i-2})
    Chebyshev, nodes: the same polynomial of degree n as n first-order steps without momentum,
        x <- x - tau_i (A x - q),   1 / tau_i = (1 + 2a) / 2 - cos(pi (2i + 1) / (2n)) / 2
    Refinement: stages of n_1, n_2, ... nodes; each later stage solves for the residual of the sum of the
        earlier stages, computed with a more exact product.
    Conjugate gradient: `conjugate_gradient.py`.

`solver_steps` is the tuple (n_1, n_2, ...). (31,) equals the paper's 30 iterations, which count the updates
after x_0.

Legend: D dim of the system; "..." any batch dims; `matvec(x)` returns S_hat x, without the ridge, for x of
any shape that it supports: in the chunk-wise op every row of x has its own matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .conjugate_gradient import Matvec, conjugate_gradient
from .transforms import batch_in_front, transforms_active

RIDGE_RATIO = 0.02
NORM_FLOOR = 1e-12  # of ||S||_F: the beta^2 of the weakest key that the layer writes
Form = Literal["nodes", "three_term"]


# ---------------------------------------------------------------------------------------- nodes


def _lebedev_finogenov(n: int) -> list[int]:
    order = [1]
    while len(order) < n:
        length = 4 * len(order)
        order = [t for first in order for t in (first, length - first)]
    return [(t - 1) // 2 for t in order]


def _leja(n: int) -> list[int]:
    nodes = [math.cos(math.pi * (2 * i + 1) / (2 * n)) for i in range(n)]
    order, log_distance = [0], [0.0] * n
    while len(order) < n:
        last = nodes[order[-1]]
        for i, node in enumerate(nodes):
            distance = abs(node - last)
            log_distance[i] += math.log(distance) if distance > 0.0 else -math.inf
        order.append(max(range(n), key=log_distance.__getitem__))
    return order


@lru_cache(maxsize=256)
def node_steps(n: int, ridge_ratio: float, smallest_last: bool = False) -> tuple[float, ...]:
    """Step sizes tau_i of the `n` Chebyshev nodes of [a, 1 + a], in a stable order.

    The order is that of Lebedev and Finogenov if n is a power of two, otherwise a Leja order. In other orders
    the intermediate iterates can grow until rounding errors are larger than the result.

    smallest_last: whether to move the smallest step to the end. It removes rounding errors along the largest
        eigenvalues, the only directions that the first tokens of a sequence read. Use it only for products with
        32-bit results: the iterates grow more on the way, and rounding to 16 bits would spread the error to all
        directions.
    """
    order = _lebedev_finogenov(n) if n & (n - 1) == 0 else _leja(n)
    middle = (1.0 + 2.0 * ridge_ratio) / 2.0
    if smallest_last:
        order.append(order.pop(order.index(n - 1)))
    return tuple(1.0 / (middle - 0.5 * math.cos(math.pi * (2 * i + 1) / (2 * n))) for i in order)


# ------------------------------------------------------------------------ iterations, matrix-free


class Product:
    """x -> S_hat x as an object that can compute a node's step at once. Other functions do it by parts."""

    def __call__(self, x: Tensor) -> Tensor:
        """S_hat x; it may be of another dtype."""
        raise NotImplementedError

    def step(self, x: Tensor, kept: float, tau: float) -> Tensor:
        """kept x - tau S_hat x; it may write over x."""
        product = self(x)
        return x.mul_(kept).sub_(product, alpha=tau)


def _stage_nodes(matvec: Matvec, rhs: Tensor, ridge_ratio: float, n: int) -> Tensor:
    known = node_steps.__wrapped__ if torch.compiler.is_compiling() else node_steps  # else torch.compile warns
    taus = known(n, ridge_ratio)
    x = rhs * taus[0]
    for tau in taus[1:]:
        kept = 1.0 - tau * ridge_ratio  # as a product: tau a may be nearly 1
        if isinstance(matvec, Product):
            x = matvec.step(x, kept, tau).add_(rhs, alpha=tau)
        else:
            product = matvec(x)
            x.mul_(kept).add_(rhs, alpha=tau).sub_(product, alpha=tau)
    return x


def _stage_three_term(matvec: Matvec, rhs: Tensor, ridge_ratio: float, n: int) -> Tensor:
    step = 2.0 / (1.0 + 2.0 * ridge_ratio)
    rho_squared = (1.0 + 2.0 * ridge_ratio) ** -2
    omega, x_previous, x = 2.0, torch.zeros_like(rhs), rhs * step
    for _ in range(n - 1):
        omega = 4.0 / (4.0 - rho_squared * omega)
        residual = matvec(x) + ridge_ratio * x - rhs
        x_previous, x = x, x - step * omega * residual + (omega - 1.0) * (x - x_previous)
    return x


def chebyshev(
    matvec: Matvec,
    rhs: Tensor,
    ridge_ratio: float,
    solver_steps: tuple[int, ...],
    *,
    residual_matvec: Matvec | None = None,
    form: Form = "nodes",
) -> Tensor:
    """Chebyshev iteration with refinement; all PyTorch backends use it.

    Args:
        matvec: x -> S_hat x, with the shape and dtype of `rhs` in and out. It may compute in low precision.
        rhs: q_hat, any shape, float32 or float64.
        ridge_ratio: a > 0.
        solver_steps: nodes of each stage, positive; len(solver_steps) - 1 residuals are computed between stages.
        residual_matvec: the product for the residuals; None means `matvec`.
        form: "nodes" (one vector) or "three_term" (the form of the paper, two vectors): the same polynomial.

    Returns:
        x with the shape and dtype of `rhs`: a polynomial in S_hat applied to `rhs`, so the solve is symmetric.
    """
    stage = _stage_nodes if form == "nodes" else _stage_three_term
    exact_matvec = matvec if residual_matvec is None else residual_matvec
    x = stage(matvec, rhs, ridge_ratio, solver_steps[0])
    for n in solver_steps[1:]:
        residual = rhs - exact_matvec(x) - ridge_ratio * x
        x = x + stage(matvec, residual, ridge_ratio, n)
    return x


# ------------------------------------------------------------------------- solvers of dense systems


class Solver(Protocol):
    """The interface of all solvers."""

    def solve(self, S_hat: Tensor, rhs: Tensor, ridge_ratio: float) -> Tensor:
        """Solve (S_hat + a I) x = rhs for x [..., D], with S_hat [..., D, D] of Frobenius norm 1 or 0."""
        ...

    def error_bound(self, ridge_ratio: float) -> float:
        """Bound of ||x - x_exact|| / ||x_exact|| in exact arithmetic."""
        ...


class _DenseProduct(Product):
    """x -> S_hat x for a symmetric S_hat [n, D, D] and x [n, 1, D].

    S_hat is symmetric, so it may be x^T S_hat: on a CPU batches of rows take a tenth of the time of columns.
    """

    def __init__(self, S_hat: Tensor) -> None:
        self.S_hat = S_hat

    def __call__(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.S_hat)

    def step(self, x: Tensor, kept: float, tau: float) -> Tensor:
        return torch.baddbmm(x, x, self.S_hat, beta=kept, alpha=-tau)


def _dense_matvec(S_hat: Tensor, product_dtype: torch.dtype | None = None) -> Matvec:
    """The function x -> S_hat x. With `product_dtype` both factors are rounded to it first, and the sum is in
    the dtype of S_hat, as in matrix units with a wide accumulator.
    """

    def rounded(tensor: Tensor) -> Tensor:
        return tensor if product_dtype is None else tensor.to(product_dtype).to(tensor.dtype)

    matrix = rounded(S_hat)
    if matrix.ndim == 3:
        return lambda x: torch.bmm(rounded(x).unsqueeze(1), matrix).squeeze(1)
    return lambda x: (rounded(x).unsqueeze(-2) @ matrix).squeeze(-2)


@dataclass(frozen=True)
class Exact:
    """LU factorisation."""

    def solve(self, S_hat: Tensor, rhs: Tensor, ridge_ratio: float) -> Tensor:
        identity = torch.eye(S_hat.shape[-1], dtype=S_hat.dtype, device=S_hat.device)
        return torch.linalg.solve(S_hat + ridge_ratio * identity, rhs.unsqueeze(-1)).squeeze(-1)

    def error_bound(self, ridge_ratio: float) -> float:
        return 0.0


@dataclass(frozen=True)
class Chebyshev:
    """Chebyshev iteration. Its error is the product over the stages of 1 / T_n(1 + 2a).

    Args:
        solver_steps: nodes of each stage.
        form: "nodes" or "three_term".
        product_dtype: dtype to which the factors of every product are rounded, except in the residuals; None
            means no rounding.
    """

    solver_steps: tuple[int, ...] = (31,)
    form: Form = "nodes"
    product_dtype: torch.dtype | None = None

    def solve(self, S_hat: Tensor, rhs: Tensor, ridge_ratio: float) -> Tensor:
        if S_hat.ndim == 3 and self.product_dtype is None:
            product, rows = _DenseProduct(S_hat), rhs.unsqueeze(1)
            return chebyshev(product, rows, ridge_ratio, self.solver_steps, form=self.form).squeeze(1)
        return chebyshev(
            _dense_matvec(S_hat, self.product_dtype),
            rhs,
            ridge_ratio,
            self.solver_steps,
            residual_matvec=_dense_matvec(S_hat),
            form=self.form,
        )

    def error_bound(self, ridge_ratio: float) -> float:
        growth = math.acosh(1.0 + 2.0 * ridge_ratio)
        return math.prod(1.0 / math.cosh(n * growth) for n in self.solver_steps)


@dataclass(frozen=True)
class GradientDescent:
    """Gradient descent with the optimal constant step, and optionally the optimal constant momentum (Polyak).

    Args:
        num_steps: number of products with S_hat plus one (the first step starts from zero).
        momentum: whether to add the previous direction.
        product_dtype: as in `Chebyshev`.
    """

    num_steps: int = 31
    momentum: bool = False
    product_dtype: torch.dtype | None = None

    @staticmethod
    def _rate(ridge_ratio: float) -> float:
        root = math.sqrt((1.0 + ridge_ratio) / ridge_ratio)
        return (root - 1.0) / (root + 1.0)

    def solve(self, S_hat: Tensor, rhs: Tensor, ridge_ratio: float) -> Tensor:
        matvec = _dense_matvec(S_hat, self.product_dtype)
        first_step = 2.0 / (1.0 + 2.0 * ridge_ratio)
        inertia = self._rate(ridge_ratio) ** 2 if self.momentum else 0.0
        step = first_step * (1.0 + inertia)
        x_previous, x = torch.zeros_like(rhs), first_step * rhs
        for _ in range(self.num_steps - 1):
            residual = matvec(x) + ridge_ratio * x - rhs
            x_previous, x = x, x - step * residual + inertia * (x - x_previous)
        return x

    def error_bound(self, ridge_ratio: float) -> float:
        n = self.num_steps
        if not self.momentum:
            return (1.0 + 2.0 * ridge_ratio) ** -n
        rate = self._rate(ridge_ratio)
        # The residual polynomial is rate^n (w T_n + (1 - w) U_n) with |T_n| <= 1 and |U_n| <= n + 1.
        weight = 2.0 * rate**2 / (1.0 + rate**2)
        return rate**n * (weight + (1.0 - weight) * (n + 1))


@dataclass(frozen=True)
class ConjugateGradient:
    """Conjugate gradient. Its iterate is no fixed polynomial in S_hat: the adjoint solve is the adjoint of the
    exact solve, to the solver's error. A solve that stops early has wrong gradients by that much (section 4.2).

    Args:
        solver_steps: products of each stage, with a tolerance at most.
        tolerance: residual at the end of a stage, relative to its start; None means a fixed count.
        product_dtype: as in `Chebyshev`.
    """

    solver_steps: tuple[int, ...] = (20,)
    tolerance: float | None = None
    product_dtype: torch.dtype | None = None

    def solve(self, S_hat: Tensor, rhs: Tensor, ridge_ratio: float) -> Tensor:
        return conjugate_gradient(
            _dense_matvec(S_hat, self.product_dtype),
            rhs,
            ridge_ratio,
            self.solver_steps,
            tolerance=self.tolerance,
            residual_matvec=_dense_matvec(S_hat),
            product_dtype=self.product_dtype,
        )

    def error_bound(self, ridge_ratio: float) -> float:
        """A stage of n products multiplies the error, in the norm of A, by at most 2 rate^n.

        In Euclidean norms that is sqrt(kappa) more. A stage that ends by the tolerance multiplies the residual by
        it; the error is at most kappa times the residual.
        """
        condition = (1.0 + ridge_ratio) / ridge_ratio
        root = math.sqrt(condition)
        rate = (root - 1.0) / (root + 1.0)
        if self.tolerance is None:
            return root * math.prod(2.0 * rate**n for n in self.solver_steps)
        least = (max(self.tolerance, 2.0 * root * rate**n) for n in self.solver_steps)
        return condition * math.prod(least)


# --------------------------------------------------------------------------- implicit differentiation


def root(squared: Tensor) -> Tensor:
    """The square root; 0, without a derivative of any order, where it is not above 0."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, torch.ones_like(squared)).sqrt(), 0.0)


def floored(norm: Tensor) -> Tensor:
    """max(||S||_F, NORM_FLOOR), and 0 where S is 0: what a system is divided by."""
    return torch.where(norm > 0, norm.clamp_min(NORM_FLOOR), norm)


def inverse_or_zero(norm: Tensor, above: float = 0.0) -> Tensor:
    """1 / norm where norm > above; else 0, without a derivative."""
    larger = norm > above
    return torch.where(larger, torch.where(larger, norm, torch.ones_like(norm)).reciprocal(), 0.0)


def ridge_solution(S: Tensor, rhs: Tensor, ridge_ratio: float, solver: Solver) -> Tensor:
    """`ridge_solve` without derivatives."""
    norm = torch.linalg.matrix_norm(S)  # inverse_or_zero(floored(norm)), in fewer operators without derivatives
    inverse_norm = torch.where(norm > 0, norm.clamp_min(NORM_FLOOR).reciprocal(), 0.0)
    D = rhs.shape[-1]
    S_hat, rhs_hat = S * inverse_norm[..., None, None], rhs * inverse_norm[..., None]
    return solver.solve(S_hat.reshape(-1, D, D), rhs_hat.reshape(-1, D), ridge_ratio).view_as(rhs)


def _inverse_norm(S: Tensor) -> Tensor:
    """1 / ||S||_F with derivatives of any order; 0, without one, where the norm is not above the floor."""
    return inverse_or_zero(root(S.square().sum((-1, -2))), NORM_FLOOR)


class _RidgeSolve(torch.autograd.Function):
    """Paper, lemma 2 and section 4.3: z = A^{-1} dx; dq = z; dA = -(z x^T + x z^T) / 2, and through
    lambda = a ||S||_F above the floor: dS = dA - a <z, x> / ||S||_F * S. It consists of this function and of
    products, which all have derivatives themselves.
    """

    @staticmethod
    def forward(S: Tensor, q: Tensor, ridge_ratio: float, solver: Solver) -> Tensor:  # type: ignore[override]
        return ridge_solution(S, q, ridge_ratio, solver)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)
        ctx.ridge_ratio, ctx.solver = inputs[2:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        S, x = ctx.saved_tensors
        z = ridge_solve(S, gradients[0], ctx.ridge_ratio, ctx.solver)
        through_ridge = ctx.ridge_ratio * (z * x).sum(-1) * _inverse_norm(S)
        outer = z.unsqueeze(-1) * x.unsqueeze(-2)
        dS = -0.5 * (outer + outer.transpose(-1, -2)) - through_ridge[..., None, None] * S
        return dS, z, None, None


class _TransformedRidgeSolve(_RidgeSolve):
    """The same under transforms and in forward mode: x' = A^{-1} (q' - A' x). torch.compile refuses such rules."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        S, x = ctx.saved_tensors
        dS, dq = (torch.zeros_like(of) if d is None else d for of, d in zip((S, x), tangents[:2], strict=True))
        dridge = ctx.ridge_ratio * (S * dS).sum((-1, -2)) * _inverse_norm(S)
        change = 0.5 * ((dS + dS.transpose(-1, -2)) @ x.unsqueeze(-1)).squeeze(-1) + dridge.unsqueeze(-1) * x
        return ridge_solve(S, dq - change, ctx.ridge_ratio, ctx.solver)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        S, q = batch_in_front(info.batch_size, in_dims[:2], inputs[:2])
        return ridge_solve(S, q, *inputs[2:]), 0


def ridge_solve(S: Tensor, q: Tensor, ridge_ratio: float, solver: Solver) -> Tensor:
    """x = (S + a max(||S||_F, NORM_FLOOR) I)^{-1} q, with implicit derivatives of any order, in both modes.

    Args:
        S: [..., D, D], symmetric positive semidefinite, float32 or float64.
        q: [..., D], dtype of S.
        ridge_ratio: a > 0.
        solver: the solver of the system and of the adjoint system.

    Returns:
        x [..., D]; zero, without a gradient, if S is zero.
    """
    function = _TransformedRidgeSolve if transforms_active() else _RidgeSolve
    result: Tensor = function.apply(S, q, ridge_ratio, solver)  # type: ignore[no-untyped-call]
    return result
