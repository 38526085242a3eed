"""The op, the layer and the model on a CUDA device: `make test-gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, family_inputs
from helpers import CASES, INPUTS, Case, assert_close, converted, doubled, make_inputs, relative_error, run

import gka
from gka.ops import State, gated_kalmanet, gated_kalmanet_step

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


@pytest.fixture(scope="module", autouse=True)
def device() -> torch.device:
    assert torch.cuda.is_available(), "these tests need a CUDA device"
    return torch.device("cuda")


def moved(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments on the device."""
    result = dict(arguments)
    for name in (*INPUTS, "cu_seqlens"):
        tensor = result.get(name)
        if tensor is not None:
            result[name] = tensor.detach().to(device)
    return result


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
    """Against the chunk-wise form in float64; dg takes <z, q> for <z, A x>, which differ by the truncation."""
    arguments = converted(moved(make_inputs(case), device), dtype)
    backend = None if case.D > 64 and dtype != torch.bfloat16 else "triton"
    out = run(arguments, backend=backend, steps=(16, 16) if dtype == torch.bfloat16 else (31,))
    ref = run(doubled(arguments), backend="chunked", steps=(100,) if dtype == torch.bfloat16 else (31,))
    assert out["o"].dtype == dtype
    o, gradients = {torch.float32: (2e-5, 2e-5), torch.float16: (1e-3, 2e-3), torch.bfloat16: (4e-3, 1.5e-2)}[
        dtype
    ]
    assert_close({"dg": out.pop("dg")}, {"dg": ref.pop("dg")}, 1.5e-2 if dtype == torch.bfloat16 else 1e-3, "dg")
    assert_close({"o": out.pop("o")}, {"o": ref.pop("o")}, o, "o")
    assert_close(out, ref, gradients)


@pytest.mark.parametrize("steps", [(16, 16), (16, 8), (8, 8, 8, 8)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, steps: tuple[int, ...], device: torch.device) -> None:
    inputs: dict[str, Any] = {n: x.to(device) for n, x in family_inputs(FAMILIES[name]).items()}
    inputs["alpha"] = inputs["beta"] = torch.ones_like(inputs["g"])
    out = run(inputs, steps=steps)
    exact = run(doubled(inputs), steps=(200,))
    print(name, steps, {n: f"{relative_error(out[n], exact[n]):.1e}" for n in exact})
    assert_close({"o": out["o"]}, {"o": exact["o"]}, 2e-3 if steps == (16, 16) else 5e-3, name)
    grads = [n for n in out if n.startswith("d")]
    assert_close({n: out[n] for n in grads}, {n: exact[n] for n in grads}, 1.5e-2, name)


def test_many_parts_and_a_long_sequence(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """131072 tokens in bfloat16 against the chunk-wise form in float32: several parts of the workspace."""
    from gka.ops import triton_op

    monkeypatch.setattr(triton_op, "WORKSPACE_BYTES", 2**27)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, 131072, 2, 128, generator=generator, device=device) for _ in range(3))
    g = torch.nn.functional.logsigmoid(torch.randn(1, 131072, 2, generator=generator, device=device) + 4)
    inputs: dict[str, Any] = {
        "q": q.bfloat16(),
        "k": k.bfloat16(),
        "v": v.bfloat16(),
        "g": g,
        "normalize_qk": True,
    }
    inputs["alpha"] = inputs["beta"] = torch.sigmoid(g)
    out = run(inputs, steps=(16, 16))
    wide = {n: x.float() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    ref = run(wide, backend="chunked", steps=(40,))
    print({n: f"{relative_error(out[n], ref[n]):.1e}" for n in ref})
    assert_close(out, ref, 2e-2)


def test_without_a_solve(device: torch.device) -> None:
    case = Case(lengths=(90, 70), H=4, Hk=2, D=64, V=40, packed=True)
    arguments = converted(moved(make_inputs(case), device), torch.bfloat16)
    arguments["S_kk"] = None
    out = run(arguments, backend="triton", steps=())
    assert_close(out, run(doubled(arguments), backend="chunked", steps=()), 1e-2)


def test_compiles_with_the_layer(device: torch.device) -> None:
    torch.manual_seed(0)
    config = gka.GKAConfig(hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    layer = gka.GatedKalmaNet(config).to(device, torch.bfloat16)
    x = torch.randn(2, 100, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True)
    results = []
    for function in (layer, compiled):
        y = function(x)
        results.append((y, *torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y))))
    for out, ref in zip(results[1], results[0], strict=True):
        assert relative_error(out, ref) < 3e-2


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
