"""A state that nobody writes to: the output falls to 0 below the floor of the norm, alike in every form."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from decode_helpers import call_step
from helpers import Case, converted, doubled, make_inputs
from torch import Tensor

from gka.ops import State, gated_kalmanet
from gka.ops.solvers import NORM_FLOOR

WRITTEN, FADING = 10, 55
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU, Triton's interpreter
NAMES = ("q", "k", "v", "g", "alpha", "beta")


def fading_inputs(dtype: torch.dtype) -> dict[str, Any]:
    """Tokens that write, then tokens that only fade the state, to e^-55."""
    arguments = converted(make_inputs(Case(lengths=(WRITTEN + FADING,), D=8, V=8, state=False)), dtype)
    arguments["beta"][:, WRITTEN:] = 0.0
    arguments["g"][:, WRITTEN:] = -1.0
    return {name: arguments[name].to(DEVICE) for name in NAMES}


def op(arguments: dict[str, Any], **options: Any) -> tuple[Tensor, State]:
    return gated_kalmanet(*(arguments[name] for name in NAMES), output_final_state=True, **options)


def steps(arguments: dict[str, Any], backend: str) -> Tensor:
    """All tokens one by one, from an empty state."""
    step = import_module(f"gka.ops.{backend}.step").gated_kalmanet_step
    B, _, H, D = arguments["q"].shape
    state, outputs = State(*torch.zeros(2, B, H, D, D, device=DEVICE)), []
    for t in range(WRITTEN + FADING):
        token = {name: arguments[name][:, t] for name in NAMES}
        token |= {"state": state, "solver_steps": (31,), "normalize_qk": False}
        o, state = call_step(step, token, inplace=False, scale=D**-0.5)
        outputs.append(o)
    return torch.stack(outputs, dim=1)


def sizes(o: Tensor) -> Tensor:
    return torch.linalg.vector_norm(o.double(), dim=(0, 2, 3)).cpu()


@pytest.mark.parametrize(
    "form",
    [
        "chunked",
        "triton",
        "chunked bfloat16",
        "triton bfloat16",
        "step torch",
        "step triton",
        "chunked cg",
        "triton cg",
    ],
)
def test_the_output_fades_as_in_float64(form: str) -> None:
    arguments = fading_inputs(torch.bfloat16 if "bfloat16" in form else torch.float32)
    exact = op(doubled(arguments), backend="reference", solver_steps=(60,))[0]
    if form.startswith("step"):
        out = steps(arguments, form.split()[1])
    else:
        solver = {"solver": "cg"} if "cg" in form else {"solver_steps": (16, 16)}
        out = op(arguments, backend=form.split()[0], **solver)[0]
    error = sizes(out - exact)
    bound = 1e-2 if "bfloat16" in form else 2e-3
    assert (error <= bound * sizes(exact) + 1e-5).all(), (error / sizes(exact)).max()


def test_the_size_stays_and_then_falls_with_the_state() -> None:
    arguments = doubled(fading_inputs(torch.float32))
    arguments["q"] = arguments["q"][:, :1].expand_as(arguments["q"])
    arguments["alpha"] = torch.ones_like(arguments["alpha"])
    o, final = op(arguments, backend="reference", solver_steps=(60,))
    assert final.S_kk is not None
    tokens_left = torch.arange(FADING - 1, -1, -1)
    norms = torch.linalg.matrix_norm(final.S_kk).amax().cpu() * torch.exp(tokens_left)
    size = sizes(o)[WRITTEN:]
    above, below = norms > 10 * NORM_FLOOR, norms < 1e-4 * NORM_FLOOR
    assert above.sum() > 20 and below.sum() > 10
    assert (size[above] / size[0] - 1).abs().max() < 1e-6
    assert size[-1] < 1e-8 * size[0]
    falls = size[below][1:] / size[below][:-1]
    assert torch.allclose(falls, torch.full_like(falls, -1.0).exp(), rtol=0.05)


@pytest.mark.parametrize("backend", ["chunked", "triton", "differentiable"])
def test_gradients_cross_the_floor(backend: str) -> None:
    """A loss of the tokens around and behind the crossing: finite, and that of float64."""

    def gradients(arguments: dict[str, Any], **options: Any) -> dict[str, Tensor]:
        leaves = {name: arguments[name].detach().clone().requires_grad_() for name in NAMES}
        o = op(leaves, **options)[0]
        o.double()[:, WRITTEN + 20 :].sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    arguments = fading_inputs(torch.float32)
    out = gradients(arguments, backend=backend, solver_steps=(31,))
    exact = gradients(doubled(arguments), backend="reference", solver_steps=(31,))
    assert out.keys() == exact.keys() == set(NAMES)
    for name, gradient in exact.items():
        error = torch.linalg.vector_norm(out[name].double() - gradient) / torch.linalg.vector_norm(gradient)
        assert error <= 1e-3, (name, error)
