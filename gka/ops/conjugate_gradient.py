"""Conjugate gradient for the systems of `solvers`, with refinement, a fixed count or a tolerance.

One stage, from x = 0 and r = p = rhs, with A = S_hat + a I, n times:

    rate = <r, r> / <p, A p>       x <- x + rate p        r <- r - rate A p
    p <- r + (<r, r> / <r, r before>) p

Step sizes fit each system's own spectrum; those of Chebyshev iteration fit the interval [a, 1 + a]. So about
two thirds of the products are enough. Later stages solve for the residual of the sum so far, as in
`solvers.chebyshev`.

With products of 16 bits p is rounded to them first, and that p is used everywhere. Each right-hand side is divided
by its largest element, so squares neither overflow nor vanish.

Legend: D dim of the system; C rows that stop together; "..." any batch dims.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .transforms import must_dispatch, unwrapped

Matvec = Callable[[Tensor], Tensor]


def conjugate_gradient(
    matvec: Matvec,
    rhs: Tensor,
    ridge_ratio: float,
    solver_steps: tuple[int, ...],
    *,
    tolerance: float | None = None,
    residual_matvec: Matvec | None = None,
    product_dtype: torch.dtype | None = None,
    rows_stop_together: bool = False,
    counts: list[Tensor] | None = None,
) -> Tensor:
    """x with (S_hat + a I) x = rhs.

    Args:
        matvec: x -> S_hat x for x of the shape and dtype of `rhs`; the result may be of another dtype.
        rhs: [..., D], float32 or float64; zero rows give zero.
        ridge_ratio: a > 0.
        solver_steps: products of each stage, with a tolerance at most; len(solver_steps) - 1 residuals are
            computed between stages.
        tolerance: a stage ends when the norm of the residual, as the iteration carries it, is at most `tolerance`
            times the norm at the start of the stage. None means always all products.
        residual_matvec: the product for the residuals between stages; None means `matvec`.
        product_dtype: dtype to which `matvec` rounds its operand; None means the dtype of `rhs`.
        rows_stop_together: whether the rows of [..., C, D] stop when the last of them may.
        counts: a list that gets the number of products of each row for each stage, [..., 1] in the dtype of rhs,
            or [..., 1, 1] if rows stop together.

    Returns:
        x, shape and dtype of `rhs`. It is no fixed polynomial in S_hat: the adjoint system needs a solve as exact.
    """
    exact_matvec = matvec if residual_matvec is None else residual_matvec

    def stage(target: Tensor, n: int) -> Tensor:
        size = target.abs().amax(-1, keepdim=True)
        size = torch.where(size > 0, size, torch.ones_like(size))
        x, count = _stage(matvec, target / size, ridge_ratio, n, tolerance, product_dtype, rows_stop_together)
        if counts is not None:
            counts.append(count)
        return x.mul_(size)

    x = stage(rhs, solver_steps[0])
    for n in solver_steps[1:]:
        x = x + stage(rhs - exact_matvec(x) - ridge_ratio * x, n)
    return x


def _stage(
    matvec: Matvec,
    residual: Tensor,
    ridge_ratio: float,
    n: int,
    tolerance: float | None,
    product_dtype: torch.dtype | None,
    rows_stop_together: bool,
) -> tuple[Tensor, Tensor]:
    """x of one stage and the number of products; `residual`, the right-hand side, is written over."""
    exact = product_dtype in (None, residual.dtype)
    least = torch.finfo(residual.dtype).tiny  # of a divisor: 0 / 0 = 0
    x, direction = torch.zeros_like(residual), _rounded(residual.clone(), product_dtype)
    energy = _dot(residual, residual)
    enough = None if tolerance is None else tolerance**2 * energy
    going = _unfinished(energy, 0.0 if enough is None else enough, rows_stop_together)
    count = going.to(residual.dtype) * (n if enough is None else 0)
    for _ in range(n):
        if enough is not None:
            if _all_finished(going):
                break
            count = count + going
        product = matvec(direction).to(residual.dtype).add_(direction, alpha=ridge_ratio)
        curvature = _dot(direction, product)  # rounding of narrow products may make it negative
        curvature = curvature.clamp_(min=least) if exact else torch.where(curvature > 0, curvature, math.inf)
        rate = energy / curvature
        if enough is not None:
            rate = rate * going
        x.addcmul_(rate, direction)
        residual.addcmul_(rate, product, value=-1.0)
        before, energy = energy, _dot(residual, residual)
        direction = _rounded(torch.addcmul(residual, energy / before.clamp_(min=least), direction), product_dtype)
        if enough is not None:
            going = going & _unfinished(energy, enough, rows_stop_together)
    return x, count


def _unfinished(energy: Tensor, enough: Tensor | float, rows_stop_together: bool) -> Tensor:
    """Whether a row must go on: any of the rows that stop together."""
    going = energy > enough
    return going.any(-2, keepdim=True) if rows_stop_together else going


def _all_finished(going: Tensor) -> bool:
    """Whether every row has stopped, where this is known without waiting for a device; elsewhere False."""
    if going.device.type != "cpu" or must_dispatch(going):
        return False
    return not unwrapped(going).any()


def _rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None or dtype == x.dtype else x.to(dtype).to(x.dtype)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each row, [..., 1]."""
    return torch.linalg.vecdot(a, b).unsqueeze(-1)
