"""How the systems of a call are solved: solver, numbers of steps, tolerance, and their defaults."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .conjugate_gradient import Matvec, conjugate_gradient
from .solvers import Chebyshev, ConjugateGradient, Solver, chebyshev

SolverName = Literal["chebyshev", "cg"]
SOLVERS: tuple[str, ...] = get_args(SolverName)


class Plan(NamedTuple):
    """The solver of a call.

    solver_steps: of each stage, Chebyshev nodes or products of conjugate gradient; () for no solve.
    solver: "chebyshev" or "cg", conjugate gradient.
    tolerance: for "cg", the residual at the end of a stage relative to its start; None means a fixed count.
    """

    solver_steps: tuple[int, ...]
    solver: str = "chebyshev"
    tolerance: float | None = None

    @property
    def products(self) -> int:
        """Products of a solve with the state, at most; the first Chebyshev node needs none."""
        return max(0, sum(self.solver_steps) - (self.solver == "chebyshev"))

    def solve(
        self,
        matvec: Matvec,
        rhs: Tensor,
        ridge_ratio: float,
        *,
        residual_matvec: Matvec | None = None,
        product_dtype: torch.dtype | None = None,
        counts: list[Tensor] | None = None,
    ) -> Tensor:
        """X [..., C, D] with (S_hat + a I) X = rhs; the C rows stop together, `counts` gets [..., 1, 1] each.

        The arguments are those of `chebyshev` and `conjugate_gradient`.
        """
        if self.solver == "chebyshev":
            return chebyshev(matvec, rhs, ridge_ratio, self.solver_steps, residual_matvec=residual_matvec)
        return conjugate_gradient(
            matvec, rhs, ridge_ratio, self.solver_steps, tolerance=self.tolerance, residual_matvec=residual_matvec,
            product_dtype=product_dtype, rows_stop_together=True, counts=counts,
        )  # fmt: skip

    def dense(self) -> Solver:
        """The same for systems that are matrices, for `ridge_solve`; every row stops alone."""
        if self.solver == "chebyshev":
            return Chebyshev(self.solver_steps)
        return ConjugateGradient(self.solver_steps, self.tolerance)


def default_solver_steps(
    dtype: torch.dtype, solver: str = "chebyshev", tolerance: float | None = None
) -> tuple[int, ...]:
    """The default stages for inputs of `dtype`: two for 16-bit floats, one for 32 and 64 bits.

    Chebyshev (16, 16) and (31,), conjugate gradient (10, 10) and (20,); with a tolerance, where the steps are an
    upper limit, (32, 32) and (64,).
    """
    narrow = dtype in (torch.bfloat16, torch.float16)
    if solver == "chebyshev":
        return (16, 16) if narrow else (31,)
    if tolerance is None:
        return (10, 10) if narrow else (20,)
    return (32, 32) if narrow else (64,)
