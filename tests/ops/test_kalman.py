"""The classical Kalman recursion gives the numbers of the regression, by a second, independent way."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error
from torch import Tensor

from gka.ops.reference import kalman_filter, ridge_regression


def data(T: int = 40, D: int = 9, V: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(2, T, 3, D, generator=generator, dtype=torch.float64), dim=-1)
    v = torch.randn(2, T, 3, V, generator=generator, dtype=torch.float64)
    g = -0.2 * torch.rand(2, T, 3, generator=generator, dtype=torch.float64)
    return k, v, g


@pytest.mark.parametrize("ridge", [0.01, 0.25, 3.0])
def test_constant_ridge_without_fading(ridge: float) -> None:
    k, v, g = data()
    expected = ridge_regression(k, v, 0 * g, ridge)
    assert relative_error(kalman_filter(k, v, 0 * g, ridge), expected) < 1e-10


@pytest.mark.parametrize("ridge", [0.01, 0.25, 3.0])
def test_ridge_that_fades_with_the_data(ridge: float) -> None:
    k, v, g = data()
    fading = ridge * g.cumsum(1).exp()
    expected = ridge_regression(k, v, g, fading)
    assert relative_error(kalman_filter(k, v, g, ridge), expected) < 1e-10
    assert relative_error(kalman_filter(k, v, g, ridge), ridge_regression(k, v, g, ridge)) > 1e-3


def test_regression_is_what_the_layer_reads() -> None:
    """x^T S_kv of the layer is q^T W of the regression, with the layer's own ridge."""
    from gka.ops import gated_kalmanet

    k, v, g = data()
    q = torch.randn(k.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    o, _ = gated_kalmanet(q, k, v, g, solver_steps=(100,), scale=1.0)
    S = torch.zeros(2, 3, 9, 9, dtype=torch.float64)
    ridges = []
    for t in range(k.shape[1]):
        S = g[:, t].exp()[..., None, None] * S + k[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
        ridges.append(0.02 * torch.linalg.matrix_norm(S))
    W = ridge_regression(k, v, g, torch.stack(ridges, dim=1))
    assert relative_error(o, (q.unsqueeze(-2) @ W).squeeze(-2)) < 1e-8


def test_recursion_breaks_in_16_bits() -> None:
    """The covariance is a difference of nearly equal numbers: bfloat16 loses it."""
    k, v, g = data(T=200)
    exact = kalman_filter(k, v, 0 * g, 0.02)
    rounded = kalman_filter(k.bfloat16(), v.bfloat16(), (0 * g).bfloat16(), 0.02)
    assert not relative_error(rounded[:, -1], exact[:, -1]) < 0.1
