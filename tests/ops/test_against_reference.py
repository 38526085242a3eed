"""The chunk-wise op against the float64 token loop: all outputs and all gradients."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import CASES, Case, assert_close, make_inputs, relative_error, run
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases

from gka.ops import State, gated_kalmanet, reference
from gka.ops.solvers import Chebyshev, Exact
from gka.ops.torch.chunk_math import Systems

pytestmark = pytest.mark.usefixtures("poisoned")


def reference_with(solver: object):
    """The reference with a solver of its own, called like the op."""

    def function(q, k, v, g, alpha, beta, **options):
        return reference.gated_kalmanet(
            q,
            k,
            v,
            g,
            alpha,
            beta,
            solver=solver,
            ridge_ratio=0.02,
            solver_steps=None,
            scale=q.shape[-1] ** -0.5,
            **options,
        )

    return function


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("solver_steps", [(31,), (16, 16), (5,), ()], ids=str)
def test_same_polynomial(case: Case, solver_steps: tuple[int, ...]) -> None:
    arguments = make_inputs(case)
    if solver_steps == () and case.state:
        arguments["S_kk"] = None
    ref = run(arguments, backend="reference", solver_steps=solver_steps)
    assert_close(run(arguments, backend="chunked", solver_steps=solver_steps, chunk_size=32), ref, 1e-10)


@given(case=cases(), chunk_size=st.integers(1, 40), seed=st.integers(0, 99))
def test_same_polynomial_random_cases(case: Case, chunk_size: int, seed: int) -> None:
    arguments = make_inputs(case, seed=seed)
    ref = run(arguments, backend="reference", solver_steps=(7, 6))
    assert_close(run(arguments, backend="chunked", solver_steps=(7, 6), chunk_size=chunk_size), ref, 1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_term_form_is_the_same_polynomial(case: Case) -> None:
    arguments = make_inputs(case)
    ref = run(arguments, reference_with(Chebyshev((31,), form="three_term")))
    assert_close(run(arguments, solver_steps=(31,)), ref, 1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_degree_100_is_exact(case: Case) -> None:
    arguments = make_inputs(case)
    assert_close(run(arguments, solver_steps=(100,)), run(arguments, reference_with(Exact())), 1e-6)


@pytest.mark.parametrize("ridge_ratio", [0.01, 0.02, 0.1])
@pytest.mark.parametrize("solver_steps", [(10,), (31,), (16, 8)], ids=str)
def test_truncation_error_within_the_bound(solver_steps: tuple[int, ...], ridge_ratio: float) -> None:
    """With S_kv = I, v = 0 and g = 0 the op returns the solution x itself."""
    arguments = make_inputs(Case(lengths=(60,), D=24, V=24, alpha=False, beta=False, state=False))
    q, k, v = (arguments[name].detach() for name in ("q", "k", "v"))
    identity = torch.eye(24, dtype=torch.float64).expand(1, 2, 24, 24)
    state = State(torch.zeros_like(identity), identity)
    options = {"ridge_ratio": ridge_ratio, "scale": 1.0, "initial_state": state}
    g = torch.zeros(q.shape[:3], dtype=torch.float64)
    x, _ = gated_kalmanet(q, k, 0 * v, g, solver_steps=solver_steps, **options)
    exact, _ = gated_kalmanet(q, k, 0 * v, g, solver_steps=(400,), **options)
    errors = (x - exact).norm(dim=-1) / exact.norm(dim=-1)
    bound = Chebyshev(solver_steps).error_bound(ridge_ratio)
    assert errors.max().item() <= bound * (1 + 1e-9) + 1e-15, "more than the bound and rounding"
    assert errors.max().item() >= bound / 50, "the bound says nothing here"


@pytest.mark.parametrize("normalize_qk", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed: bool, normalize_qk: bool) -> None:
    lengths = (4, 0, 5) if packed else (5,)
    case = Case(lengths=lengths, H=2, Hk=1, D=3, V=2, packed=packed, normalize_qk=normalize_qk)
    arguments = make_inputs(case)
    leaves = [arguments[name].detach() for name in ("q", "k", "v", "g", "alpha", "beta", "S_kk", "S_kv")]

    def function(q, k, v, g, alpha, beta, S_kk, S_kv):
        o, final = gated_kalmanet(
            q, k, v, g, alpha, beta, initial_state=State(S_kk, S_kv), output_final_state=True,
            cu_seqlens=arguments["cu_seqlens"], solver_steps=(100,), chunk_size=3, normalize_qk=normalize_qk,
        )  # fmt: skip
        assert final is not None and final.S_kk is not None
        return o, final.S_kk, final.S_kv

    inputs = [leaf.clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_precisions(case: Case, dtype: torch.dtype) -> None:
    """Against float64 arithmetic on the same rounded inputs; 16-bit errors are those of rounding o itself."""
    arguments = make_inputs(case, dtype)
    rounded = {
        name: x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }
    out = run(arguments)
    assert {out[name].dtype for name in ("o", "dq", "dk", "dv")} == {dtype}
    assert out["final S_kv"].dtype == torch.float32
    bound = 2e-5 if dtype == torch.float32 else 2e-2
    ref = run(rounded, solver_steps=(100,) if dtype != torch.float32 else (31,))
    assert_close(out, ref, bound)


def test_spec_error_of_degree_31() -> None:
    assert Chebyshev((31,)).error_bound(0.02) == pytest.approx(3e-4, rel=0.1)
    assert math.isclose(Chebyshev((16, 16)).error_bound(0.02), Chebyshev((16,)).error_bound(0.02) ** 2)


def test_metric_sees_nan_and_missing_gradients() -> None:
    one = torch.ones(3)
    with pytest.raises(AssertionError):
        assert_close({"o": one * torch.nan}, {"o": one}, 1e9)
    assert relative_error(torch.zeros(3), one) == 1.0


@pytest.mark.parametrize(("solver_steps", "deviation"), [((5,), 1e-3), ((31,), 1e-6), ((200,), 0.0)], ids=str)
def test_gate_gradient_takes_the_product_not_the_right_hand_side(
    solver_steps: tuple[int, ...], deviation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """<z, A x> in the gate's gradient is <z, q> for an exact solve only; cut short, <z, q> is not the
    gradient that goes with dk, while <z, A x> is."""
    case = Case(lengths=(24,), H=2, Hk=2, alpha=False, beta=False, state=False)
    arguments = make_inputs(case)
    ref = run(arguments, backend="reference", solver_steps=solver_steps)["dg"]
    assert relative_error(run(arguments, solver_steps=solver_steps, chunk_size=24)["dg"], ref) < 1e-10
    rows = arguments["q"].detach()[0].transpose(0, 1).unsqueeze(1)
    monkeypatch.setattr(Systems, "inner_zAx", lambda self, Z, X: (Z * rows).sum(-1))
    error = relative_error(run(arguments, solver_steps=solver_steps, chunk_size=24)["dg"], ref)
    assert error > deviation if deviation else error < 1e-10
