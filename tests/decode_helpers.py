"""Tokens and states for tests of one decode step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from helpers import assert_close, relative_error
from torch import Tensor

from gka.ops import State
from gka.ops.torch import step as pytorch
from gka.ops.types import Arguments


@dataclass(frozen=True)
class StepCase:
    """One shape of decode step; `dtype` of q, k and v, `state` of the states."""

    B: int = 2
    H: int = 2
    Hk: int = 1
    D: int = 16
    V: int = 16
    solver_steps: tuple[int, ...] = (16, 16)
    dtype: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    alpha: bool = True
    beta: bool = True
    normalize_qk: bool = True
    solver: str = "chebyshev"
    tolerance: float | None = None

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("alpha", "beta", "normalize_qk") if getattr(self, name))
        flags += "" if self.solver == "chebyshev" else f"-{self.solver}-{self.tolerance}"
        types = "-".join(str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.state))
        return f"B{self.B}-H{self.H}/{self.Hk}-D{self.D}-V{self.V}-{self.solver_steps}-{types}{flags}"


STEP_CASES = (
    StepCase(H=4, Hk=2, D=128, V=128, dtype=torch.bfloat16),
    StepCase(B=1, H=4, D=128, V=128, solver_steps=(31,), state=torch.bfloat16, beta=False),
    StepCase(D=5, V=9, solver_steps=(31,)),
    StepCase(B=3, H=3, Hk=3, D=33, V=5, alpha=False, normalize_qk=False),
    StepCase(B=1, D=100, V=130, solver_steps=(8, 8, 8, 8), dtype=torch.float16),
    StepCase(B=1, H=4, Hk=2, D=64, V=40, state=torch.bfloat16, normalize_qk=False),
    StepCase(H=1, D=96, V=300, solver_steps=(), state=torch.bfloat16),
    StepCase(D=7, V=64, solver_steps=(), alpha=False, beta=False, dtype=torch.bfloat16),
    StepCase(B=1, D=40, V=1, solver_steps=(1, 2, 1)),
    StepCase(D=1, V=1, state=torch.bfloat16),
    StepCase(B=0),
    StepCase(B=1, H=4, D=128, V=128, solver_steps=(40,), solver="cg"),
    StepCase(B=1, H=3, Hk=3, D=33, V=5, solver_steps=(20, 1, 12), solver="cg"),
    StepCase(D=5, V=9, solver_steps=(40, 40), state=torch.bfloat16, solver="cg", tolerance=1e-4),
)


def step_arguments(case: StepCase, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Arguments of `gated_kalmanet_step` without its options of place."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    B, H, D = case.B, case.H, case.D
    q, k = normal(B, H, D), normal(B, case.Hk, D)
    if not case.normalize_qk:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    root = normal(B, H, D, 2 * D) / D
    S_kk = (root @ root.transpose(-1, -2)).to(case.state)
    return {
        "q": q.to(device, case.dtype),
        "k": k.to(device, case.dtype),
        "v": normal(B, case.Hk, case.V).to(device, case.dtype),
        "g": torch.nn.functional.logsigmoid(normal(B, H) + 3).to(device),
        "alpha": torch.sigmoid(normal(B, H)).to(device) if case.alpha else None,
        "beta": torch.sigmoid(normal(B, H)).to(device) if case.beta else None,
        "state": State(
            S_kk.to(device) if case.solver_steps else None, (normal(B, H, D, case.V) / D).to(device, case.state)
        ),
        "solver_steps": case.solver_steps,
        "normalize_qk": case.normalize_qk,
        "solver": case.solver,
        "tolerance": case.tolerance,
    }


def copied(state: State) -> State:
    return State(*(None if x is None else x.clone() for x in state))  # type: ignore[arg-type]


def call_step(
    function: Any, arguments: dict[str, Any], *, inplace: bool, scale: float = 0.3, **options: Any
) -> tuple[Tensor, State]:
    """A backend's step of `step_arguments`, with a ridge ratio of 0.02."""
    return function(packed_arguments(arguments, scale), inplace=inplace, **options)


def packed_arguments(arguments: dict[str, Any], scale: float = 0.3) -> Arguments:
    tensors = [arguments[name] for name in ("q", "k", "v", "g", "alpha", "beta")]
    solver_steps, normalize_qk = arguments["solver_steps"], arguments["normalize_qk"]
    solver = {name: arguments[name] for name in ("solver", "tolerance") if name in arguments}
    return Arguments(*tensors, *arguments["state"], None, 0.02, solver_steps, scale, normalize_qk, **solver)


def reference_step(arguments: dict[str, Any]) -> tuple[Tensor, State]:
    """The step of PyTorch in float64."""

    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) else x

    given = {name: wide(x) for name, x in arguments.items()} | {"state": State(*map(wide, arguments["state"]))}
    return call_step(pytorch.gated_kalmanet_step, given, inplace=False)


def assert_step_equals_the_reference(function: Any, case: StepCase, device: torch.device | str = "cpu") -> None:
    """A backend's step, both ways, to rounding of float32 and of what is stored."""
    arguments = step_arguments(case, device)
    expected_o, expected = reference_step(arguments)
    before = copied(arguments["state"])
    o, new = call_step(function, arguments, inplace=False)
    assert o.dtype == case.dtype and new.S_kv.dtype == case.state and (new.S_kk is None) == (not case.solver_steps)
    bound = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
    assert_close({"o": o}, {"o": expected_o}, bound[case.dtype], "o")
    for x, ref, old, given in zip(new, expected, before, arguments["state"], strict=True):
        if x is not None:
            assert_close({"state": x}, {"state": ref}, 1e-6 if case.state == torch.float32 else 3e-3, "state")
            assert torch.equal(old, given)
    held = copied(before)
    o_again, returned = call_step(function, {**arguments, "state": held}, inplace=True)
    assert torch.equal(o_again, o)
    for x, ref, given in zip(returned, new, held, strict=True):
        assert x is given and (x is None or torch.equal(x, ref))


def assert_slow_decay_adds_no_error_up(function: Any) -> None:
    """A step rounds once at the size of the state. Twice, for a slow decay alike at every token, gives 5e-6."""
    torch.manual_seed(0)
    g = torch.full((1, 1), -1e-5)
    k, v = torch.rand(2, 1, 1, 16) + 0.5
    exact = (k.mT @ v).double() / -torch.expm1(g.double())
    state = State(None, exact.float()[None])
    for _ in range(200):
        keys, values = (x + 0.3 * torch.randn(1, 1, 16) for x in (k, v))
        given = dict(q=keys, k=keys, v=values, g=g, alpha=None, beta=None, solver_steps=(), normalize_qk=False)
        given["state"] = state
        _, state = call_step(function, given, inplace=False)
        exact = exact * g.double().exp() + keys.mT.double() @ values.double()
    assert relative_error(state.S_kv[0], exact) < 1e-6
