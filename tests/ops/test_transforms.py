"""Derivatives of every kind: forward mode, gradients of gradients, torch.func and torch.vmap, on odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import INPUTS, Case, assert_close, make_inputs, relative_error, run
from torch import Tensor
from torch.autograd import forward_ad

from gka.ops import State, gated_kalmanet, gated_kalmanet_step

CONVERGED = (64, 64)  # the derivative is that of the exact solve: finite differences need one
SMALL = Case(lengths=(5, 5), H=2, Hk=1, D=3, V=2)
PACKED = Case(lengths=(3, 0, 4), H=2, Hk=1, D=3, V=2, packed=True, normalize_qk=True)
BARE = Case(lengths=(5,), H=1, Hk=1, D=3, V=2, alpha=False, beta=False, state=False)
CASES = (SMALL, PACKED, BARE)


def tensors_and_function(
    case: Case, step: bool = False, **options: Any
) -> tuple[list[Tensor], Callable[..., tuple[Tensor, ...]]]:
    """The tensors of a case, and the outputs as a function of them."""
    arguments = make_inputs(case)
    names = [name for name in INPUTS if arguments.get(name) is not None]
    options = {"solver_steps": CONVERGED, "normalize_qk": case.normalize_qk, **options}

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        a = dict(zip(names, given, strict=True))
        state = State(a.pop("S_kk"), a.pop("S_kv")) if case.state else None
        if step:
            o, new = gated_kalmanet_step(**a, state=state, **options)
            return o, *new
        o, final = gated_kalmanet(
            **a, initial_state=state, output_final_state=True, cu_seqlens=arguments["cu_seqlens"], **options
        )
        return o, *final

    tensors = [arguments[name].detach() for name in names]
    if step:
        tensors = [x[:, 0] if name not in ("S_kk", "S_kv") else x for name, x in zip(names, tensors, strict=True)]
    return [x.clone() for x in tensors], function


def directions(tensors: list[Tensor]) -> list[Tensor]:
    """One of every tensor; that of S_kk is symmetric, as S_kk is."""
    generator = torch.Generator().manual_seed(5)
    found = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in tensors]
    return [x + x.transpose(-1, -2) if number == INPUTS.index("S_kk") else x for number, x in enumerate(found)]


def finite_difference(function: Callable[..., tuple[Tensor, ...]], at: list[Tensor], to: list[Tensor]) -> Any:
    step = 1e-6
    ahead, behind = (function(*(x + s * d for x, d in zip(at, to, strict=True))) for s in (step, -step))
    return [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]


@pytest.mark.parametrize("chunk_size", [2, None])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_differentiable_form_is_the_op(case: Case, chunk_size: int | None) -> None:
    """Outputs and gradients; the truncated solve of few steps, too."""
    arguments, options = make_inputs(case), {"solver_steps": (6, 5), "chunk_size": chunk_size}
    assert_close(run(arguments, backend="differentiable", **options), run(arguments, **options), 1e-11)


def test_no_tokens() -> None:
    tensors, function = tensors_and_function(Case(lengths=(0, 0), D=3, V=2))
    found = torch.vmap(function)(*(x[None] for x in tensors))
    assert found[0].shape == (1, 2, 0, 2, 2)
    assert torch.equal(found[1][0], tensors[6]) and torch.equal(found[2][0], tensors[7])


def test_without_a_solve() -> None:
    arguments = make_inputs(PACKED)
    del arguments["S_kk"]
    assert_close(run(arguments, backend="differentiable", solver_steps=()), run(arguments, solver_steps=()), 1e-12)


@pytest.mark.parametrize("step", [False, True], ids=["op", "step"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_mode(case: Case, step: bool) -> None:
    if step and (case.packed or not case.state):
        pytest.skip("a step takes a state and no packed sequences")
    tensors, function = tensors_and_function(case, step, **({} if step else {"chunk_size": 2}))
    tangents = directions(tensors)
    expected = finite_difference(function, tensors, tangents)
    found = torch.func.jvp(function, tuple(tensors), tuple(tangents))[1]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, d) for x, d in zip(tensors, tangents, strict=True)]
        plain = [forward_ad.unpack_dual(x).tangent for x in function(*duals)]
    for one, other, difference in zip(found, plain, expected, strict=True):
        assert relative_error(one, difference) < 1e-7
        assert relative_error(other, difference) < 1e-7


@pytest.mark.parametrize("step", [False, True], ids=["op", "step"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hessian_vector_products(case: Case, step: bool) -> None:
    """By two backward passes, forward over reverse and reverse over reverse, of a loss through all outputs."""
    if step and (case.packed or not case.state):
        pytest.skip("a step takes a state and no packed sequences")
    tensors, function = tensors_and_function(case, step)
    tangents = tuple(directions(tensors))

    def loss(*given: Tensor) -> Tensor:
        return sum((x.sin().sum() for x in function(*given)), start=torch.zeros(()))

    numbers = tuple(range(len(tensors)))
    grad = torch.func.grad(loss, argnums=numbers)

    def first(*given: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in given]
        return torch.autograd.grad(loss(*leaves), leaves)

    def inner(*given: Tensor) -> Tensor:
        return sum((d * x).sum() for d, x in zip(tangents, grad(*given), strict=True))

    expected = finite_difference(first, tensors, list(tangents))
    leaves = [x.clone().requires_grad_() for x in tensors]
    gradients = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    backward = torch.autograd.grad(gradients, leaves, tangents)
    forward = torch.func.jvp(grad, tuple(tensors), tangents)[1]
    reverse = torch.func.grad(inner, argnums=numbers)(*tensors)
    for name, found in (("backward", backward), ("forward", forward), ("reverse", reverse)):
        for number, (one, difference) in enumerate(zip(found, expected, strict=True)):
            assert relative_error(one, difference) < 1e-6, (name, number)


@pytest.mark.parametrize("step", [False, True], ids=["op", "step"])
def test_gradients_of_every_sample(step: bool) -> None:
    tensors, function = tensors_and_function(SMALL, step, solver_steps=(7, 3))
    samples = [torch.stack([x, 0.5 * x, 0.7 * x]) for x in tensors]
    numbers = tuple(range(len(tensors)))
    grad = torch.func.grad(lambda *x: function(*x)[0].sin().sum(), argnums=numbers)
    together = torch.vmap(grad)(*samples)
    for n in range(3):
        leaves = [x[n].clone().requires_grad_() for x in samples]
        expected = torch.autograd.grad(function(*leaves)[0].sin().sum(), leaves)
        for one, alone in zip(together, expected, strict=True):
            assert relative_error(one[n], alone) < 1e-11
    shared = torch.vmap(grad, in_dims=(0, *[None] * (len(tensors) - 1)))(samples[0], *tensors[1:])
    for one, alone in zip(shared, grad(samples[0][1], *tensors[1:]), strict=True):
        assert relative_error(one[1], alone) < 1e-11


def test_of_no_past_nothing_has_a_derivative_that_is_no_number() -> None:
    """Where S_kk is zero, x is zero: first tokens with beta = 0, and zero keys that are normalised."""
    tensors, _ = tensors_and_function(BARE)
    q, k, v, g = (x.requires_grad_() for x in tensors)
    silent = torch.tensor([0.0, 0, 1, 1, 0], dtype=q.dtype).view(1, 5, 1)
    keys = k * silent.unsqueeze(-1)
    o, _ = gated_kalmanet(q, keys, v, g, beta=silent, normalize_qk=True)
    first = torch.autograd.grad(o.sin().sum(), (q, k, v, g), create_graph=True)
    second = torch.autograd.grad(sum(x.sin().sum() for x in first), (q, k, v, g))
    tangent = torch.func.jvp(
        lambda k: gated_kalmanet(q, k, v, g, beta=silent, normalize_qk=True)[0], (keys,), (k,)
    )[1]
    assert all(x.isfinite().all() for x in (*first, *second, tangent))


def test_what_cannot_be_says_so() -> None:
    tensors, function = tensors_and_function(SMALL, backend="triton")
    with pytest.raises(ValueError, match=r"backend is 'triton', which runs under no transform.*'differentiable'"):
        torch.func.jvp(function, tuple(tensors), tuple(tensors))
    tensors, function = tensors_and_function(SMALL, step=True, inplace=True)
    with pytest.raises(ValueError, match=r"inplace=True writes over the states.*leave inplace out"):
        torch.func.jvp(function, tuple(tensors), tuple(tensors))
    q, edges = torch.zeros(1, 4, 1, 2), torch.tensor([[0, 4], [0, 4]])
    with pytest.raises(ValueError, match=r"cu_seqlens is mapped by torch.vmap; expected .*in_dims=None"):
        torch.vmap(lambda e: gated_kalmanet(q, q, q, q[..., 0], cu_seqlens=e)[0])(edges)
    with pytest.raises(ValueError, match=r"g has a value of 1.0; expected"):
        torch.vmap(lambda g: gated_kalmanet(q, q, q, g)[0])(torch.ones(2, 1, 4, 1))


def test_transforms_inside_a_compiled_function() -> None:
    """The compiler differentiates the iterations of the solve, not the solve: equal where it has converged."""
    torch._dynamo.reset()
    tensors, function = tensors_and_function(BARE, solver_steps=(16,), ridge_ratio=1.0)

    def tangents(*given: Tensor) -> Tensor:
        return torch.func.jvp(lambda *x: function(*x)[0], given, given)[1]

    found = torch.compile(tangents, fullgraph=True, backend="aot_eager")(*tensors)
    assert relative_error(found, tangents(*tensors)) < 1e-9
