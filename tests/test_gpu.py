"""The op, the layer and the model on a CUDA device: `make test-gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, family_inputs
from helpers import CASES, INPUTS, Case, assert_close, make_inputs, relative_error, run

import gka
from gka.ops import State, gated_kalmanet, gated_kalmanet_step

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


@pytest.fixture(scope="module", autouse=True)
def device() -> torch.device:
    assert torch.cuda.is_available(), "these tests need a CUDA device"
    return torch.device("cuda")


def moved(arguments: dict[str, Any], device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Arguments on the device; q, k, v in `dtype`, the rest in float32 unless all is float64."""
    result = dict(arguments)
    for name in (*INPUTS, "cu_seqlens"):
        tensor = result.get(name)
        if tensor is not None:
            result[name] = tensor.detach().to(device)
            if dtype is not None and name != "cu_seqlens":
                result[name] = result[name].to(dtype if name in ("q", "k", "v") else torch.float32)
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_equals_the_cpu(case: Case, device: torch.device) -> None:
    arguments = make_inputs(case)
    out = run(moved(arguments, device))
    assert_close({n: x.cpu() for n, x in out.items()}, run(arguments, backend="reference"), 1e-10)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)], ids=str
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_precisions(case: Case, dtype: torch.dtype, bound: float, device: torch.device) -> None:
    arguments = moved(make_inputs(case), device, dtype)
    exact = {
        n: x.double() if isinstance(x, torch.Tensor) and n != "cu_seqlens" else x for n, x in arguments.items()
    }
    out, ref = run(arguments), run(exact, steps=(31,) if dtype == torch.float32 else (100,))
    assert out["o"].dtype == dtype
    assert_close(out, ref, bound)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, device: torch.device) -> None:
    inputs = {n: x.to(device) for n, x in family_inputs(FAMILIES[name]).items()}
    inputs["alpha"] = inputs["beta"] = torch.ones_like(inputs["g"])
    out = run(inputs)
    exact = run({n: x.double() for n, x in inputs.items()}, steps=(200,))
    assert_close({"o": out["o"]}, {"o": exact["o"]}, 5e-3, name)
    grads = [n for n in out if n.startswith("d")]
    assert_close({n: out[n] for n in grads}, {n: exact[n] for n in grads}, 2e-2, name)


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


def test_values_are_checked_only_when_asked_for(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 4, 1, 8, device=device)
    g = torch.full((1, 4, 1), 0.5, device=device)
    gated_kalmanet(q, q, q, g)
    monkeypatch.setenv("GKA_CHECK_VALUES", "1")
    with pytest.raises(ValueError, match=r"g has a value of 0\.5"):
        gated_kalmanet(q, q, q, g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_equals_the_cpu(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    config = gka.GKAConfig(
        vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    model = gka.GKAForCausalLM(config).eval()
    tokens = torch.randint(0, 50, (2, 40))
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    with torch.no_grad():
        ref = model(tokens, attention_mask=mask).logits[mask.bool()]
        out = model.to(device, dtype)(tokens.to(device), attention_mask=mask.to(device)).logits.cpu()[mask.bool()]
    assert relative_error(out, ref) < (1e-4 if dtype == torch.float32 else 5e-2)
    text = model.generate(tokens.to(device), attention_mask=mask.to(device), max_new_tokens=5, do_sample=False)
    assert text.shape == (2, 45)
