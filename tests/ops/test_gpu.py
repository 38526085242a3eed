"""The op and its decode step on a CUDA device: `make test-gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode_helpers import STEP_CASES, StepCase, assert_step_equals_the_reference, step_arguments
from families import FAMILIES, Family, family_inputs, first_tokens, gradients_of, with_gates
from gpu_helpers import moved
from helpers import CASES, Case, assert_close, converted, doubled, make_inputs, relative_error, run

from gka.ops import State, gated_kalmanet, gated_kalmanet_step

if torch.cuda.is_available():
    from gka.ops.triton import step as triton_step

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_equals_the_cpu(case: Case, device: torch.device) -> None:
    arguments = make_inputs(case)
    out = run(moved(arguments, device))
    assert_close({n: x.cpu() for n, x in out.items()}, run(arguments, backend="reference"), 1e-10)


MORE = (
    Case(lengths=(200,), H=4, Hk=2, D=128, V=128, normalize_qk=True),
    Case(lengths=(130, 130), H=2, Hk=2, D=64, V=24, alpha=False, beta=False, state=False),
    Case(lengths=(3, 100, 0, 64, 65), H=3, Hk=1, D=96, V=40, packed=True),
    Case(lengths=(150,), H=2, Hk=1, D=128, V=200),
    Case(lengths=(150,), H=1, Hk=1, D=100, V=17, normalize_qk=True),
    Case(lengths=(0, 0), H=2, Hk=1, D=5, V=3),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CASES, *MORE], ids=str)
def test_kernels(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Against the chunk-wise form in float64."""
    arguments = converted(moved(make_inputs(case), device), dtype)
    backend = None if case.D > 64 and dtype == torch.float32 else "triton"
    refined = dtype == torch.bfloat16 or (dtype == torch.float16 and case.D > 64)  # products of 16 bits
    out = run(arguments, backend=backend, solver_steps=(16, 16) if refined else (31,))
    ref = run(doubled(arguments), backend="chunked", solver_steps=(100,) if refined else (31,))
    assert out["o"].dtype == dtype
    bounds = {torch.float32: (2e-5, 2e-5), torch.float16: (1e-3, 2e-3), torch.bfloat16: (4e-3, 1.5e-2)}
    o, gradients = (2e-3, 6e-3) if refined and dtype == torch.float16 else bounds[dtype]
    assert_close({"o": out.pop("o")}, {"o": ref.pop("o")}, o, "o")
    assert_close(out, ref, gradients)


@pytest.mark.parametrize("random", [False, True], ids=["gates 1", "gates random"])
@pytest.mark.parametrize(("solver_steps", "bounds"), [((16, 16), (2e-3, 5e-3)), ((16, 8), (5e-3, 4e-2))], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_families(
    name: str, solver_steps: tuple[int, ...], bounds: tuple[float, float], random: bool, device: torch.device
) -> None:
    inputs: dict[str, Any] = moved(with_gates(family_inputs(FAMILIES[name], H=4), random), device)
    out, exact = run(inputs, solver_steps=solver_steps), run(doubled(inputs), solver_steps=(200,))
    print(name, solver_steps, {n: f"{relative_error(out[n], exact[n]):.1e}" for n in exact})
    assert_close({"o": out["o"]}, {"o": exact["o"]}, bounds[0], name)
    assert_close(gradients_of(out), gradients_of(exact), bounds[1], name)


@pytest.mark.parametrize("options", [{}, {"tolerance": 0.02}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_families_by_conjugate_gradient(name: str, options: dict[str, Any], device: torch.device) -> None:
    inputs: dict[str, Any] = moved(with_gates(family_inputs(FAMILIES[name], H=4), random=True), device)
    out, exact = run(inputs, solver="cg", **options), run(doubled(inputs), solver_steps=(200,))
    print(name, options, {n: f"{relative_error(out[n], exact[n]):.1e}" for n in exact})
    assert_close({"o": out["o"]}, {"o": exact["o"]}, 2.5e-3, name)
    assert_close(gradients_of(out), gradients_of(exact), 5e-3, name)


@pytest.mark.parametrize("case", MORE, ids=str)
def test_conjugate_gradient_in_float32(case: Case, device: torch.device) -> None:
    arguments = converted(moved(make_inputs(case), device), torch.float32)
    out = run(arguments, backend="triton" if case.D <= 64 else None, solver="cg", solver_steps=(40,))
    assert_close(out, run(doubled(arguments), backend="chunked", solver_steps=(150,)), 5e-5)


def test_first_tokens(device: torch.device) -> None:
    inputs = moved(with_gates(first_tokens(sequences=200, length=3, H=4), random=False), device)
    out, exact = run(inputs, solver_steps=(16, 16)), run(doubled(inputs), solver_steps=(200,))
    for place in range(3):
        assert_close({"o": out["o"][:, place::3]}, {"o": exact["o"][:, place::3]}, 4e-3, f"token {place}")


def test_starts_of_packed_sequences(device: torch.device) -> None:
    lengths = (1, 2, 3, 64, 65, 100, 17, 300, 5)
    inputs: dict[str, Any] = moved(with_gates(family_inputs(Family(sum(lengths), 4.0), H=4), random=True), device)
    inputs["cu_seqlens"] = torch.tensor([0, *lengths], device=device).cumsum(0)
    out, exact = run(inputs, solver_steps=(16, 16)), run(doubled(inputs), solver_steps=(200,))
    assert_close(gradients_of(out), gradients_of(exact), 5e-3)


def test_many_parts_and_a_long_sequence(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """131072 tokens in bfloat16 against the chunk-wise form in float64: several parts of the workspace."""
    from gka.ops.triton import call

    monkeypatch.setattr(call, "WORKSPACE_BYTES", 2**27)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, 131072, 2, 128, generator=generator, device=device) for _ in range(3))
    g = torch.nn.functional.logsigmoid(torch.randn(1, 131072, 2, generator=generator, device=device) + 9)
    inputs: dict[str, Any] = {
        "q": q.bfloat16(),
        "k": k.bfloat16(),
        "v": v.bfloat16(),
        "g": g,
        "normalize_qk": True,
    }
    inputs["alpha"] = inputs["beta"] = torch.sigmoid(g)
    out = run(inputs, solver_steps=(16, 16))
    ref = run(doubled(inputs), backend="chunked", solver_steps=(60,))
    print({n: f"{relative_error(out[n], ref[n]):.1e}" for n in ref})
    assert_close(out, ref, 5e-3)


def test_without_a_solve(device: torch.device) -> None:
    case = Case(lengths=(90, 70), H=4, Hk=2, D=64, V=40, packed=True)
    arguments = converted(moved(make_inputs(case), device), torch.bfloat16)
    arguments["S_kk"] = None
    out = run(arguments, backend="triton", solver_steps=())
    assert_close(out, run(doubled(arguments), backend="chunked", solver_steps=()), 1e-2)


def test_step_equals_whole(device: torch.device) -> None:
    arguments = moved(make_inputs(Case(lengths=(9, 9))), device)
    tokens = [arguments[n] for n in ("q", "k", "v", "g", "alpha", "beta")]
    state = State(arguments["S_kk"], arguments["S_kv"])
    ref, _ = gated_kalmanet(*tokens, initial_state=state)
    outputs = []
    for t in range(9):
        o, state = gated_kalmanet_step(*(x[:, t] for x in tokens), state=state)
        outputs.append(o)
    assert relative_error(torch.stack(outputs, dim=1), ref) < 1e-10


@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_step(case: StepCase, device: torch.device) -> None:
    assert_step_equals_the_reference(triton_step.gated_kalmanet_step, case, device)


def test_step_takes_the_kernel_unless_a_gradient_is_needed(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    launch = triton_step._launch
    monkeypatch.setattr(triton_step, "_launch", lambda *given: calls.append(1) or launch(*given))
    arguments = step_arguments(StepCase(D=128, V=128, H=4, Hk=2, dtype=torch.bfloat16), device)
    out, _ = gated_kalmanet_step(**arguments)
    assert calls == [1]
    arguments["q"].requires_grad_()
    ref, _ = gated_kalmanet_step(**arguments)
    assert calls == [1] and relative_error(out, ref) < 5e-3
    with torch.no_grad():
        gated_kalmanet_step(**arguments)
    assert calls == [1, 1]


def test_step_of_many_states(device: torch.device) -> None:
    """More than 2^31 numbers of a state: the last sequence's address has 64 bits."""
    B, H = 4100, 32
    one = step_arguments(StepCase(B=1, H=H, Hk=H, D=128, V=128, state=torch.bfloat16), device)
    many = {n: x.expand(B, *x.shape[1:]).contiguous() for n, x in one.items() if isinstance(x, torch.Tensor)}
    state = State(*(x.expand(B, *x.shape[1:]).contiguous() for x in one["state"]))
    o, state = gated_kalmanet_step(
        **many, state=state, solver_steps=one["solver_steps"], normalize_qk=True, inplace=True, scale=0.3
    )
    ref, new = gated_kalmanet_step(**{**one, "scale": 0.3})
    assert torch.equal(o[-1], ref[0]) and torch.equal(o[0], ref[0])
    assert torch.equal(state.S_kv[-1], new.S_kv[0]) and torch.equal(state.S_kk[-1], new.S_kk[0])


@pytest.mark.parametrize("solver_steps", [[8, 8], []], ids=str)
def test_registration_of_the_step(solver_steps: list[int], device: torch.device) -> None:
    a = step_arguments(StepCase(solver_steps=tuple(solver_steps)), device)
    tensors = [a.get(n) for n in ("q", "k", "v", "g", "alpha", "beta")]
    given = (*tensors, *a["state"], 0.02, solver_steps, 0.3, True, "chebyshev", None)
    torch.library.opcheck(triton_step._step, given)
    for state_indices in (None, torch.tensor([1, -1], device=device)):
        torch.library.opcheck(triton_step._step_, (*given, state_indices))


def test_values_are_checked_only_when_asked_for(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 4, 1, 8, device=device)
    g = torch.full((1, 4, 1), 0.5, device=device)
    gated_kalmanet(q, q, q, g)
    monkeypatch.setenv("GKA_CHECK_VALUES", "1")
    with pytest.raises(ValueError, match=r"g has a value of 0\.5"):
        gated_kalmanet(q, q, q, g)
