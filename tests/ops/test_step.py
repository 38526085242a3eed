"""One decode step on the CPU: in place, bfloat16 states, and what it refuses. Values: `test_invariance.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode_helpers import (
    STEP_CASES,
    StepCase,
    assert_slow_decay_adds_no_error_up,
    assert_step_equals_the_reference,
    copied,
    step_arguments,
)
from helpers import relative_error

import gka
from gka.ops import State, gated_kalmanet_step
from gka.ops.torch import step


@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_pytorch(case: StepCase) -> None:
    assert_step_equals_the_reference(step.gated_kalmanet_step, case)


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_the_tensors_given_hold_the_new_state(state: torch.dtype) -> None:
    arguments = step_arguments(StepCase(state=state))
    held = copied(arguments["state"])
    o, new = gated_kalmanet_step(**arguments)
    o_again, returned = gated_kalmanet_step(**{**arguments, "state": held}, inplace=True)
    assert torch.equal(o, o_again) and returned.S_kk is held.S_kk and returned.S_kv is held.S_kv
    assert torch.equal(held.S_kk, new.S_kk) and torch.equal(held.S_kv, new.S_kv)


def test_bfloat16_states_drift_by_their_rounding_only() -> None:
    """64 tokens with states rounded at each one, beside float32 states."""
    wide = State(torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 16, 16))
    narrow = State(*(x.bfloat16() for x in wide))
    for seed in range(64):
        arguments = step_arguments(StepCase(B=1), seed=seed)
        o, wide = gated_kalmanet_step(**{**arguments, "state": wide})
        o_narrow, narrow = gated_kalmanet_step(**{**arguments, "state": narrow})
    assert relative_error(narrow.S_kk, wide.S_kk) < 1e-2
    assert relative_error(o_narrow, o) < 3e-2


@pytest.mark.parametrize("name", ["q", "g", "S_kv"])
def test_not_in_place_where_a_gradient_is_needed(name: str) -> None:
    arguments = step_arguments(StepCase())
    wanting = arguments["state"].S_kv if name == "S_kv" else arguments[name]
    wanting.requires_grad_()
    with pytest.raises(ValueError, match=r"inplace=True overwrites the states.*no_grad"):
        gated_kalmanet_step(**arguments, inplace=True)
    o, _ = gated_kalmanet_step(**arguments)
    assert torch.autograd.grad(o.sum(), wanting)[0].isfinite().all()
    with torch.no_grad():
        gated_kalmanet_step(**arguments, inplace=True)


def test_gradients_through_bfloat16_states() -> None:
    arguments = step_arguments(StepCase(state=torch.bfloat16))
    S_kv = arguments["state"].S_kv.requires_grad_()
    o, new = gated_kalmanet_step(**arguments)
    (gradient,) = torch.autograd.grad(o.sum() + new.S_kv.float().sum(), S_kv)
    assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all()


F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
STATES = {
    "float16": (F32, F16, F16, "S_kv has dtype torch.float16; expected torch.float32 for torch.float32 inputs"),
    "mixed": (F32, F32, BF16, "S_kk has dtype torch.float32; expected S_kv's, torch.bfloat16"),
    "mixed again": (F32, BF16, F32, "S_kk has dtype torch.bfloat16; expected S_kv's, torch.float32"),
    "float64 inputs": (F64, BF16, BF16, "S_kv has dtype torch.bfloat16; expected torch.float64 for"),
}


@pytest.mark.parametrize("name", STATES)
def test_dtypes_of_states(name: str) -> None:
    dtype, kk, kv, message = STATES[name]
    arguments: dict[str, Any] = step_arguments(StepCase(dtype=dtype))
    S_kk, S_kv = arguments["state"]
    arguments["state"] = State(S_kk.to(kk), S_kv.to(kv))
    with pytest.raises(TypeError, match=message):
        gated_kalmanet_step(**arguments)


def test_a_decode_step_of_the_layer_writes_the_caches_own_states() -> None:
    """Without gradients nothing is copied; with gradients the values are the same."""
    torch.manual_seed(0)
    config = gka.GKAConfig(
        vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model, tokens = gka.GKAForCausalLM(config), torch.randint(0, 20, (2, 8))
    logits = []
    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients):
            cache = model(tokens[:, :5], use_cache=True).past_key_values
            held = {n: x for n, x in cache.layers[0].recurrent_states.items() if x is not None}
            with torch.no_grad():
                before = [x.clone() for x in held.values()]
            for t in range(5, 8):
                logits.append(model(tokens[:, t : t + 1], past_key_values=cache).logits)
        assert all(cache.layers[0].recurrent_states[n] is x for n, x in held.items())
        assert not any(torch.equal(x, old) for x, old in zip(held.values(), before, strict=True))
    for no_gradient, gradient in zip(logits[:3], logits[3:], strict=True):
        assert relative_error(no_gradient, gradient) < 1e-5


@pytest.mark.parametrize("g", [-1e-5, -1e-3, -0.3])
def test_a_decay_that_never_changes_adds_no_error_up(g: float) -> None:
    """e^g in float32 is off by up to 3e-8 of it, at every token alike: over 4,000 tokens 1e-4 of a state."""
    tokens = 4000
    S = State(*(torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(n)) for n in range(2)))
    old = S.S_kv.double()
    zero, unit = torch.zeros(1, 1, 3), torch.full((1, 1), 1.0)
    with torch.no_grad():
        for _ in range(tokens):
            _, S = gated_kalmanet_step(zero, zero, zero, g * unit, state=S, solver_steps=(2,), inplace=True)
    exact = old * torch.tensor(g).double().mul(tokens).exp()
    assert relative_error(S.S_kv, exact) < 5e-6 if exact.norm() > 1e-30 else S.S_kv.norm() < 1e-30


def test_a_slow_decay_of_a_state_at_rest_adds_no_error_up() -> None:
    assert_slow_decay_adds_no_error_up(step.gated_kalmanet_step)
