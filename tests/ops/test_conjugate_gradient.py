"""Conjugate gradient as the solver of the op: every backend in PyTorch, edges, counts and tolerances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode_helpers import StepCase, step_arguments
from families import (
    FAMILIES,
    TRAINED_LAYERS,
    Family,
    family_inputs,
    gradients_of,
    trained_inputs,
    with_gates,
)
from helpers import CASES, Case, assert_close, converted, doubled, make_inputs, relative_error, run

from gka.ops import gated_kalmanet, gated_kalmanet_step
from gka.ops.conjugate_gradient import conjugate_gradient
from gka.ops.solvers import Exact
from gka.ops.torch.products import products_needed
from gka.ops.types import Arguments

CG: dict[str, Any] = {"solver": "cg"}


@pytest.mark.parametrize("backend", ["chunked", "differentiable"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_long_solve_is_exact(case: Case, backend: str) -> None:
    """Outputs, states and the gradients of both losses; packed sequences, groups and initial states."""
    arguments = make_inputs(case)
    out = run(arguments, backend=backend, **CG, solver_steps=(60,), chunk_size=16)
    assert_close(out, run(arguments, backend="chunked", solver_steps=(150,)), 1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_in_16_bits(name: str) -> None:
    """20 products have the bounds that 30 of Chebyshev iteration have."""
    family = FAMILIES[name]
    inputs = with_gates(family_inputs(Family(96, family.m, family.common), H=1), random=True)
    out, exact = run(inputs, **CG), run(doubled(inputs), solver_steps=(200,))
    assert_close({"o": out["o"]}, {"o": exact["o"]}, 2e-3, name)
    assert_close(gradients_of(out), gradients_of(exact), 4e-3, name)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_in_float32(name: str) -> None:
    """By default 20 products are more exact than 30 of Chebyshev iteration."""
    family = FAMILIES[name]
    inputs: dict[str, Any] = with_gates(family_inputs(Family(96, family.m, family.common), H=1), random=True)
    inputs = {key: x.float() for key, x in inputs.items()}
    exact = run(doubled(inputs), solver_steps=(200,))
    out, nodes = run(inputs, **CG), run(inputs)
    assert_close(out, exact, 2e-4, name)
    assert relative_error(out["o"], exact["o"]) < 0.5 * relative_error(nodes["o"], exact["o"])
    # 10 products are not enough.
    few = run(inputs, solver="cg", solver_steps=(10,))
    assert relative_error(few["o"], exact["o"]) > 5 * relative_error(nodes["o"], exact["o"])


def test_gradients_by_differences() -> None:
    inputs = make_inputs(Case(lengths=(6,), H=2, Hk=1, D=3, V=2))
    names = ("q", "k", "v", "g", "alpha", "beta")

    def op(*tensors: torch.Tensor) -> torch.Tensor:
        return gated_kalmanet(*tensors, **CG, solver_steps=(40,), chunk_size=4, backend="chunked")[0]

    leaves = [inputs[name].detach().clamp(max=-1e-3) if name == "g" else inputs[name].detach() for name in names]
    assert torch.autograd.gradcheck(op, [x.requires_grad_() for x in leaves], eps=1e-6, atol=1e-6)


def test_gradients_of_gradients_and_forward_mode() -> None:
    """The rules of the solve use the same solver."""
    inputs = make_inputs(Case(lengths=(3,), H=1, Hk=1, D=2, V=1, state=False))
    others = [inputs[name].detach() for name in ("v", "g", "alpha", "beta")]

    def op(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return gated_kalmanet(q, k, *others, **CG, solver_steps=(30,), chunk_size=4)[0]

    leaves = [inputs[name].detach().requires_grad_() for name in ("q", "k")]
    assert torch.autograd.gradgradcheck(op, leaves, atol=1e-5)
    tangents = tuple(torch.ones_like(x) for x in leaves)
    _, forward = torch.func.jvp(op, tuple(leaves), tangents)
    step = 1e-6
    moved = [op(*(x + sign * step for x in leaves)) for sign in (1, -1)]
    assert relative_error(forward, (moved[0] - moved[1]) / (2 * step)) < 1e-6


def test_few_products_leave_consistent_gradients() -> None:
    """dq is the adjoint solve and dg takes <z, A x>: the gradient of a layer far from convergence stays near."""
    arguments = converted(make_inputs(CASES[6]), torch.float32)
    out = run(arguments, backend="chunked", chunk_size=16, **CG, solver_steps=(6,))
    exact = run(doubled(arguments), backend="chunked", solver_steps=(200,))
    error = relative_error(out["o"], exact["o"])
    assert 1e-4 < error < 0.1
    for name, gradient in gradients_of(out).items():
        assert relative_error(gradient, exact[name]) < 10 * error, name


def test_zero_rows_and_zero_states() -> None:
    """x = 0 where S_kk or q is zero, and finite gradients; nothing of a past that was forgotten."""
    arguments = converted(make_inputs(Case(lengths=(40,), Hk=2, state=False)), torch.float32)
    with torch.no_grad():
        arguments["k"][:, :5] = 0.0
        arguments["q"][:, 8:11] = 0.0
        arguments["g"][:, 20] = -torch.inf
    for options in ({}, {"tolerance": 1e-4}, {"solver_steps": (80,)}):
        out = run(arguments, backend="chunked", chunk_size=16, **CG, **options)
        assert all(x.isfinite().all() for x in out.values())
        assert not out["o"][:, :5].any() and not out["o"][:, 8:11].any()
        assert_close(out, run(doubled(arguments), backend="chunked", solver_steps=(200,)), 2e-3)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12])
def test_the_size_of_the_right_hand_side_does_not_count(size: float) -> None:
    """Squares of tiny gradients would vanish in float32."""
    S, rhs = dense_systems()
    x = conjugate_gradient(product(S), rhs, 0.02, (8, 8), product_dtype=torch.float32)
    scaled = conjugate_gradient(product(S), rhs * size, 0.02, (8, 8), product_dtype=torch.float32)
    assert relative_error(scaled.double() / size, x) < 1e-5


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-4])
def test_a_tolerance_is_reached_with_few_products(tolerance: float) -> None:
    S, rhs = dense_systems()
    counts: list[torch.Tensor] = []
    x = conjugate_gradient(product(S), rhs, 0.02, (64,), tolerance=tolerance, counts=counts)
    residual = (rhs - product(S)(x) - 0.02 * x).norm(dim=-1) / rhs.norm(dim=-1)
    assert residual.max() <= 1.01 * tolerance
    (count,) = counts
    assert count.shape == (*rhs.shape[:-1], 1) and count.max() < 40
    for n in range(len(S)):  # one product less is not enough
        less = conjugate_gradient(product(S[n]), rhs[n], 0.02, (int(count[n]) - 1,))
        assert (rhs[n] - product(S[n])(less) - 0.02 * less).norm() > 0.99 * tolerance * rhs[n].norm()


def test_rows_stop_together() -> None:
    S, rhs = dense_systems()
    counts: list[torch.Tensor] = []
    conjugate_gradient(product(S), rhs, 0.02, (64,), tolerance=1e-2, counts=counts)
    grouped: list[torch.Tensor] = []
    conjugate_gradient(product(S), rhs, 0.02, (64,), tolerance=1e-2, rows_stop_together=True, counts=grouped)
    assert grouped[0].item() == counts[0].max() > counts[0].min()


@pytest.mark.parametrize("backend", ["chunked", "differentiable"])
def test_padding_keeps_no_chunk_going(backend: str) -> None:
    """A sequence alone and in a packed row, before another one, has the same numbers."""
    arguments = make_inputs(Case(lengths=(21, 40), packed=True, state=False))
    options: dict[str, Any] = dict(solver="cg", tolerance=0.1, chunk_size=16, backend=backend)
    packed = run(arguments, **options)
    alone = {
        n: x[:, :21] if isinstance(x, torch.Tensor) and n != "cu_seqlens" else x for n, x in arguments.items()
    }
    alone["cu_seqlens"] = None
    o, _ = gated_kalmanet(
        *(alone[n] for n in ("q", "k", "v", "g", "alpha", "beta")), **options, normalize_qk=False
    )
    assert relative_error(packed["o"][:, :21], o) < 1e-12


def test_fullgraph() -> None:
    torch._dynamo.reset()
    arguments, options = make_inputs(CASES[6]), {"tolerance": 1e-3, "solver_steps": (9, 50)}
    compiled = torch.compile(gated_kalmanet, fullgraph=True, backend="aot_eager")
    assert_close(run(arguments, compiled, **CG, **options), run(arguments, **CG, **options), 1e-12)


@pytest.mark.parametrize("options", [{}, {"tolerance": 1e-3}], ids=str)
def test_a_step_is_one_token_of_the_op(options: dict[str, Any]) -> None:
    """Eagerly, and compiled as one graph."""
    arguments = step_arguments(StepCase(D=33, V=7, dtype=torch.float64, state=torch.float64))
    arguments |= {"solver_steps": None, "tolerance": None, **CG, **options}
    o, state = gated_kalmanet_step(**arguments)
    token = {n: x.unsqueeze(1) for n, x in arguments.items() if n in ("q", "k", "v", "g", "alpha", "beta")}
    same, final = gated_kalmanet(
        **token, initial_state=arguments["state"], output_final_state=True, normalize_qk=True, **CG, **options
    )
    assert relative_error(o, same[:, 0]) < 1e-6 and relative_error(state.S_kk, final.S_kk) < 1e-12
    if not options:
        return
    torch._dynamo.reset()
    compiled = torch.compile(gated_kalmanet_step, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(**arguments)[0], o) < 1e-6


def dense_systems(D: int = 24, count: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """S_hat [count, D, D] of norm 1, from nearly rank one to flat, and right-hand sides, float32."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(count, D, D, generator=generator, dtype=torch.float64))[0]
    powers = torch.linspace(0.0, 6.0, count, dtype=torch.float64).unsqueeze(1)
    spectrum = torch.linspace(0.05, 1.0, D, dtype=torch.float64).pow(powers)
    S = vectors @ torch.diag_embed(spectrum) @ vectors.mT
    S = S / torch.linalg.matrix_norm(S)[:, None, None]
    rhs = torch.randn(count, D, generator=generator, dtype=torch.float64)
    x = Exact().solve(S, rhs, 0.02)
    assert relative_error(conjugate_gradient(product(S), rhs, 0.02, (60,)), x) < 1e-9
    return S.float(), rhs.float()


def product(S: torch.Tensor) -> Any:
    return lambda x: (S @ x.unsqueeze(-1)).squeeze(-1)


kernels = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_gpu.py runs the kernels themselves"),
]


def with_kernels(function: Any) -> Any:
    """Mark a test that runs kernels through Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is made for Linux only")
    for mark in kernels:
        function = mark(function)
    return function


KERNEL_CASES = (
    (CASES[6], {"solver_steps": (24,)}),
    (Case(lengths=(5, 0, 20, 1), H=2, Hk=1, D=9, V=5, packed=True), {"tolerance": 1e-5}),
)


@with_kernels
@pytest.mark.parametrize(("case", "options"), KERNEL_CASES, ids=str)
def test_kernels_in_float32(case: Case, options: dict[str, Any]) -> None:
    arguments = converted(make_inputs(case), torch.float32)
    out = run(arguments, backend="triton", chunk_size=16, **CG, **options)
    assert_close(out, run(doubled(arguments), backend="chunked", solver_steps=(150,)), 5e-5)


@with_kernels
@pytest.mark.parametrize(
    ("name", "options"), zip(FAMILIES, ({}, {}, {"tolerance": 0.02}, {}), strict=True), ids=str
)
def test_kernels_on_families(name: str, options: dict[str, Any]) -> None:
    family = FAMILIES[name]
    inputs = with_gates(family_inputs(Family(70, family.m, family.common), H=1), random=True)
    out = run(inputs, backend="triton", **CG, **options)
    exact = run(doubled(inputs), backend="chunked", solver_steps=(200,))
    assert_close({"o": out["o"]}, {"o": exact["o"]}, 2.5e-3, name)
    assert_close(gradients_of(out), gradients_of(exact), 5e-3, name)


@with_kernels
def test_kernels_refuse_a_tolerance_that_triton_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    from gka.ops.triton import config

    inputs = trained_inputs(0)
    tensors = [inputs[name] for name in ("q", "k", "v", "g")]
    monkeypatch.setattr(config, "capability", lambda _: (10, 0))
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    with pytest.raises(ValueError, match=r"tolerance is 0\.1; expected None on this GPU with Triton 3\.6\.0"):
        gated_kalmanet(*tensors, **CG, tolerance=0.1, backend="triton")


@with_kernels
def test_kernels_with_zero_rows_and_states() -> None:
    """Also with gradients so small that their squares are zero in float32."""
    arguments = converted(make_inputs(Case(lengths=(40,), Hk=2, state=False)), torch.bfloat16)
    with torch.no_grad():
        arguments["k"][:, :5] = 0.0
        arguments["q"][:, 8:11] = 0.0
        arguments["g"][:, 20] = -torch.inf
        arguments["v"].mul_(1e-24)
    options: dict[str, Any] = dict(chunk_size=32, solver="cg")
    out = run(arguments, backend="triton", **options)
    assert all(x.isfinite().all() for x in out.values())
    assert not out["o"][:, :5].any() and not out["o"][:, 8:11].any()
    ref = run(doubled(arguments), backend="chunked", solver_steps=(150,))
    for name in ("o", "dq", "dk"):
        scale = 1 / ref[name].norm()
        assert relative_error(out[name].double() * scale, ref[name] * scale) < 1.5e-2, name


@pytest.mark.parametrize("layer", TRAINED_LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_states_of_trained_layers(layer: int, dtype: torch.dtype) -> None:
    """Both solvers: states of a few strong directions are no harder than the families."""
    inputs = {
        n: x if n in "gab" or dtype == torch.bfloat16 else x.float() for n, x in trained_inputs(layer).items()
    }
    exact = run(doubled(inputs), solver_steps=(200,))
    for options in ({}, CG, {**CG, "tolerance": 0.03 if dtype == torch.bfloat16 else 1e-4}):
        out = run(inputs, **options)
        bounds = (2e-3, 4e-3) if dtype == torch.bfloat16 else (3e-4, 3e-3)
        assert_close({"o": out["o"]}, {"o": exact["o"]}, bounds[0], str(options))
        assert_close(gradients_of(out), gradients_of(exact), bounds[1], str(options))


def test_products_needed() -> None:
    """Fewer for a looser tolerance; as many as the iteration makes."""
    inputs = trained_inputs(0)
    tensors = [inputs[name].float() for name in ("q", "k", "v", "g", "alpha", "beta")]
    means = []
    for tolerance in (0.1, 1e-3):
        arguments = Arguments(*tensors, None, None, None, 0.02, (64,), 1.0, False, 64, "cg", tolerance)
        (counts,) = products_needed(arguments)
        assert counts.shape == (3, tensors[0].shape[2]) and (counts == counts.round()).all()
        means.append(counts.mean().item())
        most = int(counts.max())
        whole = run(inputs, **CG, tolerance=tolerance, solver_steps=(64,), chunk_size=64)
        limited = run(inputs, **CG, tolerance=tolerance, solver_steps=(most,), chunk_size=64)
        assert torch.equal(whole["o"], limited["o"])
    assert 1 < means[0] < means[1] < 40
    with pytest.raises(ValueError, match="tolerance is None"):
        products_needed(arguments._replace(tolerance=None))
