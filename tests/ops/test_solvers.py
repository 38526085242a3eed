"""Solvers against the exact solution and their own error bounds; orders of the Chebyshev nodes."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import relative_error
from torch import Tensor

from gka.ops.solvers import (
    Chebyshev,
    ConjugateGradient,
    Exact,
    GradientDescent,
    Solver,
    _lebedev_finogenov,
    _leja,
    node_steps,
    ridge_solve,
)

RATIOS = (0.01, 0.02, 0.1)


def systems(D: int = 24, count: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """S_hat of Frobenius norm 1 and right-hand sides; spectra from flat to almost all at zero."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(count, D, D, generator=generator, dtype=torch.float64))[0]
    powers = torch.linspace(0.0, 8.0, count, dtype=torch.float64).unsqueeze(1)
    spectrum = torch.linspace(0.0, 1.0, D, dtype=torch.float64).pow(powers)
    S = vectors @ torch.diag_embed(spectrum) @ vectors.transpose(-1, -2)
    S = S / torch.linalg.matrix_norm(S)[:, None, None]
    return S, torch.randn(count, D, generator=generator, dtype=torch.float64)


SOLVERS: list[Solver] = [
    Chebyshev((31,)),
    Chebyshev((10,)),
    Chebyshev((31,), form="three_term"),
    Chebyshev((16, 16)),
    Chebyshev((8, 8, 8), form="three_term"),
    ConjugateGradient((8,)),
    ConjugateGradient((20,)),
    ConjugateGradient((6, 6)),
    ConjugateGradient((40, 40), 0.05),
    ConjugateGradient((3,), 1e-6),
    GradientDescent(31),
    GradientDescent(200),
    GradientDescent(31, momentum=True),
    GradientDescent(80, momentum=True),
]


@pytest.mark.parametrize("ridge_ratio", RATIOS)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_error_within_the_bound(solver: Solver, ridge_ratio: float) -> None:
    S, rhs = systems()
    exact = Exact().solve(S, rhs, ridge_ratio)
    errors = (solver.solve(S, rhs, ridge_ratio) - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert errors.max().item() <= solver.error_bound(ridge_ratio) + 1e-12


@pytest.mark.parametrize("solver", [s for s in SOLVERS if not isinstance(s, ConjugateGradient)], ids=str)
def test_bound_is_tight(solver: Solver) -> None:
    """A spectrum that fills [0, 1] with the worst right-hand side comes within a factor 3 of the bound."""
    eigenvalues = torch.linspace(0.0, 1.0, 4001, dtype=torch.float64)
    scalars = eigenvalues[:, None, None]
    exact = 1.0 / (eigenvalues + 0.02)
    x = solver.solve(scalars, torch.ones(4001, 1, dtype=torch.float64), 0.02).squeeze(-1)
    worst = ((x - exact) / exact).abs().max().item()
    assert solver.error_bound(0.02) / 3 <= worst <= solver.error_bound(0.02) * (1 + 1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 31, 32, 64, 100])
@pytest.mark.parametrize("ridge_ratio", RATIOS)
def test_node_form_is_the_three_term_polynomial(n: int, ridge_ratio: float) -> None:
    S, rhs = systems()
    nodes = Chebyshev((n,)).solve(S, rhs, ridge_ratio)
    assert relative_error(nodes, Chebyshev((n,), form="three_term").solve(S, rhs, ridge_ratio)) < 1e-10


def test_polynomials_are_symmetric() -> None:
    """<p(S) a, b> = <a, p(S) b>: so the adjoint solve is the solve itself (paper, lemma 2)."""
    S, a = systems()
    b = a.flip(0)
    for solver in (Chebyshev((31,)), Chebyshev((5, 4)), GradientDescent(9, momentum=True)):
        left = (solver.solve(S, a, 0.02) * b).sum(-1)
        assert relative_error(left, (a * solver.solve(S, b, 0.02)).sum(-1)) < 1e-10
    conjugate = ConjugateGradient((5,))
    left = (conjugate.solve(S, a, 0.02) * b).sum(-1)
    assert relative_error(left, (a * conjugate.solve(S, b, 0.02)).sum(-1)) > 1e-4


def test_node_orders() -> None:
    assert _lebedev_finogenov(8) == [0, 7, 3, 4, 1, 6, 2, 5]
    for n in (1, 2, 7, 31, 100):
        assert sorted(_leja(n)) == list(range(n))
    middle = 0.52
    expected = sorted(1 / (middle - 0.5 * math.cos(math.pi * (2 * i + 1) / 16)) for i in range(8))
    assert sorted(node_steps(8, 0.02)) == pytest.approx(expected)
    last = node_steps(8, 0.02, smallest_last=True)
    assert sorted(last) == pytest.approx(expected) and last[-1] == min(last)


@pytest.mark.parametrize("n", [31, 32, 100])
def test_node_order_is_stable_in_float32(n: int) -> None:
    S, rhs = systems()
    exact = Chebyshev((n,)).solve(S, rhs, 0.02)
    assert relative_error(Chebyshev((n,)).solve(S.float(), rhs.float(), 0.02), exact) < 2e-5


def test_refinement_cures_low_precision() -> None:
    S, rhs = (tensor.float() for tensor in systems(D=64))
    exact = Exact().solve(S.double(), rhs.double(), 0.02)
    plain = Chebyshev((32,), product_dtype=torch.bfloat16).solve(S, rhs, 0.02)
    refined = Chebyshev((16, 16), product_dtype=torch.bfloat16).solve(S, rhs, 0.02)
    assert relative_error(plain, exact) > 3e-3
    assert relative_error(refined, exact) < 1.2e-3


def test_exact_gradient_against_autograd() -> None:
    """`ridge_solve` differentiates implicitly what autograd differentiates through the factorisation."""
    root, q = systems(D=6, count=3)
    leaves = [(3 * root).requires_grad_(), q.requires_grad_()]

    def direct(S: Tensor, q: Tensor) -> Tensor:
        S = 0.5 * (S + S.transpose(-1, -2))
        ridge = 0.02 * torch.linalg.matrix_norm(S)[:, None, None] * torch.eye(6, dtype=torch.float64)
        return torch.linalg.solve(S + ridge, q.unsqueeze(-1)).squeeze(-1)

    def implicit(S: Tensor, q: Tensor) -> Tensor:
        return ridge_solve(0.5 * (S + S.transpose(-1, -2)), q, 0.02, Exact())

    cotangent = torch.randn(3, 6, dtype=torch.float64)
    expected = torch.autograd.grad((direct(*leaves) * cotangent).sum(), leaves)
    got = torch.autograd.grad((implicit(*leaves) * cotangent).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-12


def test_zero_system_gives_zero_without_gradient() -> None:
    S = torch.zeros(2, 4, 4, dtype=torch.float64, requires_grad=True)
    q = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    x = ridge_solve(S, q, 0.02, Chebyshev())
    x.sum().backward()
    assert not x.any() and S.grad is not None and q.grad is not None
    assert not S.grad.any() and not q.grad.any()
