"""The op, the layer and the model on a CUDA device: `make test-gpu`."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from decode_helpers import STEP_CASES, StepCase, assert_step_equals_the_reference, step_arguments
from families import FAMILIES, Family, family_inputs, first_tokens, gradients_of, with_gates
from helpers import CASES, INPUTS, Case, assert_close, converted, doubled, make_inputs, relative_error, run
from model_helpers import ROWS, layer_outcome, tiny_layer
from torch import Tensor
from transformers import StaticCache

import gka
from gka.nn import gated_norm
from gka.nn.layer import GatedRMSNorm
from gka.nn.short_conv import ShortConv, packing
from gka.ops import State, gated_kalmanet, gated_kalmanet_step
from gka.ops.triton import conv as conv_kernels

if torch.cuda.is_available():
    from gka.ops.triton import step as triton_step

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
    """Against the chunk-wise form in float64."""
    arguments = converted(moved(make_inputs(case), device), dtype)
    backend = None if case.D > 64 and dtype != torch.bfloat16 else "triton"
    out = run(arguments, backend=backend, solver_steps=(16, 16) if dtype == torch.bfloat16 else (31,))
    ref = run(doubled(arguments), backend="chunked", solver_steps=(100,) if dtype == torch.bfloat16 else (31,))
    assert out["o"].dtype == dtype
    o, gradients = {torch.float32: (2e-5, 2e-5), torch.float16: (1e-3, 2e-3), torch.bfloat16: (4e-3, 1.5e-2)}[
        dtype
    ]
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
    from gka.ops.triton import op as triton_op

    monkeypatch.setattr(triton_op, "WORKSPACE_BYTES", 2**27)
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


@pytest.fixture
def with_extra(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> bool:
    """Whether flash-linear-attention's norm is used: a parameter, True without one."""
    wanted = bool(getattr(request, "param", True))
    if wanted and importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed: pip install 'gated-kalmanet[cuda]'")
    monkeypatch.setattr(gated_norm, "installed", lambda: wanted)
    assert not wanted or gated_norm.kernels() is not None
    return wanted


both_ways = pytest.mark.parametrize("with_extra", [True, False], ids=["with the extra", "without"], indirect=True)


@both_ways
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_compiles_with_the_layer(packed: bool, with_extra: bool, device: torch.device) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = gka.GKAConfig(hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    layer = gka.GatedKalmaNet.from_config(config).to(device, torch.bfloat16)
    x = torch.randn(1 if packed else 2, 100, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    options = {"cu_seqlens": torch.tensor([0, 30, 30, 31, 100], device=device)} if packed else {}
    compiled = torch.compile(layer, fullgraph=True)
    results = []
    for function in (layer, compiled):
        y = function(x, **options)
        results.append((y, *torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y))))
    for out, ref in zip(results[1], results[0], strict=True):
        assert relative_error(out, ref) < 3e-2


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_layer_equals_the_cpu_in_float64(
    rows: str, dtype: torch.dtype, with_extra: bool, device: torch.device
) -> None:
    if rows == "autocast" and dtype != torch.float32:
        pytest.skip("autocast is for float32 parameters")
    layer = tiny_layer(dtype)
    ref = layer_outcome(copy.deepcopy(layer).double(), "plain" if rows == "autocast" else rows, T=150)
    out = {name: x.cpu() for name, x in layer_outcome(layer.to(device), rows, T=150).items()}
    print(rows, dtype, {name: f"{relative_error(out[name], ref[name]):.1e}" for name in ref})
    exact = dtype == torch.float32 and rows != "autocast"
    for name in ref:
        bound = (1e-4 if exact else 3e-2) if name == "out" or "states" in name else (2e-3 if exact else 8e-2)
        if name in ("A_log", "dt_bias", "a_proj.weight") and not exact:
            bound = 0.1  # sums of dg that nearly cancel at heads of 10: 4.9e-2 to 8.4e-2; on the CPU to 4.4e-2
        assert_close({name: out[name]}, {name: ref[name]}, bound, f"{rows} {name}")


def differentiated(y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and the gradients of the leaves, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(2)
    cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64).bfloat16()
    grads = torch.autograd.grad(y, list(leaves.values()), cotangent.to(y.device, y.dtype))
    found = {"y": y, **dict(zip(leaves, grads, strict=True))}
    return {name: x.detach().cpu().double() for name, x in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "channels, width, T", [(37, 4, 131), (256, 4, 64), (40, 1, 100), (300, 8, 259), (5, 4, 2)]
)
@pytest.mark.parametrize("kind", ["plain", "state", "packed"])
def test_short_convolution(
    kind: str, channels: int, width: int, T: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    conv = ShortConv(channels, width).to(dtype)
    given = {"x": torch.randn(1 if kind == "packed" else 2, T, channels).to(dtype)}
    if kind == "state":
        given["state"] = torch.randn(2, channels, width - 1).to(dtype)
    edges = torch.tensor([0, 1, 1, T // 2 + 1, T - 1, T] if T > 2 else [0, 1, 1, T])
    results = []
    for where, wide in ((device, dtype), (torch.device("cpu"), torch.float64)):
        module = copy.deepcopy(conv).to(where, wide)
        leaves = {name: x.to(where, wide).requires_grad_() for name, x in given.items()}
        assert conv_kernels.usable(leaves["x"], width) == (where == device)
        if kind == "packed":
            packed = packing(leaves["x"], edges.to(where), width)
            y = module(leaves["x"], packed=packed)
        else:
            y = module(**leaves)
        results.append(differentiated(y, leaves | {"weight": module.weight}))
    assert_close(*results, {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [5, 100, 128, 600])
def test_gated_norm_with_the_extra(dim: int, dtype: torch.dtype, with_extra: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    norm = GatedRMSNorm(dim, 1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight)
    given = {name: torch.randn(2, 77, 3, dim).to(dtype) for name in ("o", "gate")}
    results = []
    for where, wide in ((device, dtype), (torch.device("cpu"), torch.float64)):
        module = copy.deepcopy(norm).to(where, wide)
        leaves = {name: x.to(where, wide).requires_grad_() for name, x in given.items()}
        results.append(differentiated(module(**leaves), leaves | {"weight": module.weight}))
    assert_close(*results, {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype])


LONG, WIDE, TAIL = 1_100_000, 2048, 1000  # more than 2^31 elements


@pytest.fixture
def long_sequence(device: torch.device) -> Tensor:
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB of free memory")
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, LONG, WIDE, generator=generator, device=device, dtype=torch.bfloat16)
    return x.requires_grad_()


def test_short_convolution_of_more_than_2_to_the_31_elements(long_sequence: Tensor) -> None:
    """The last tokens of a long sequence, against a call on these alone."""
    x, conv = long_sequence, ShortConv(WIDE, 4).to(long_sequence.device, torch.bfloat16)
    y = conv(x)
    (dx,) = torch.autograd.grad(y, x, y)
    last = x.detach()[:, -TAIL:].clone().requires_grad_()
    ref = conv(last, x.detach()[:, -TAIL - 3 : -TAIL].transpose(1, 2))
    (dlast,) = torch.autograd.grad(ref, last, ref)
    assert relative_error(y[:, -TAIL:], ref) < 1e-6 and relative_error(dx[:, -TAIL:], dlast) < 1e-6


def test_gated_norm_of_more_than_2_to_the_31_elements(with_extra: bool, long_sequence: Tensor) -> None:
    norm = GatedRMSNorm(128, 1e-6).to(long_sequence.device, torch.bfloat16)
    heads = long_sequence.detach().view(1, LONG, 16, 128).requires_grad_()
    few = heads.detach()[:, -TAIL:].clone().requires_grad_()
    y, ref = norm(heads, heads.detach()), norm(few, few.detach())
    (dx,), (dlast,) = torch.autograd.grad(y, heads, y), torch.autograd.grad(ref, few, ref)
    assert relative_error(y[:, -TAIL:], ref) < 1e-6 and relative_error(dx[:, -TAIL:], dlast) < 1e-6


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
    for operator in (triton_step._step, triton_step._step_):
        torch.library.opcheck(operator, (*tensors, *a["state"], 0.02, solver_steps, 0.3, True))


def decoder(device: torch.device) -> gka.GKAForCausalLM:
    torch.manual_seed(0)
    config = gka.GKAConfig(
        vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    return gka.GKAForCausalLM(config).eval().to(device)


@torch.no_grad()
def test_decoding_compiles_as_one_graph(device: torch.device) -> None:
    """The states stay where they are, as CUDA graphs need them."""
    torch._dynamo.reset()
    model, tokens = decoder(device), torch.randint(0, 50, (2, 9), device=device)
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(tokens[:, :5], past_key_values=cache)
    held = [x for x in cache.layers[0].recurrent_states.values() if x is not None]
    places = [x.data_ptr() for x in held]
    compiled = torch.compile(model.forward, fullgraph=True)
    steps = [
        compiled(
            tokens[:, t : t + 1], past_key_values=cache, position_ids=torch.tensor([[t]], device=device)
        ).logits
        for t in range(5, 9)
    ]
    ref = model(tokens, use_cache=False).logits[:, 5:]
    assert relative_error(torch.cat(steps, dim=1), ref) < 1e-4
    assert [x.data_ptr() for x in cache.layers[0].recurrent_states.values() if x is not None] == places


@torch.no_grad()
def test_generate_equals_the_parallel_form(device: torch.device) -> None:
    """Greedy text, and the logits of every token decoded one by one."""
    model, tokens = decoder(device), torch.randint(0, 50, (2, 12), device=device)
    options: dict[str, Any] = dict(max_new_tokens=16, do_sample=False)
    assert torch.equal(
        model.generate(tokens, use_cache=True, **options), model.generate(tokens, use_cache=False, **options)
    )
    cache = model(tokens[:, :4], use_cache=True).past_key_values
    steps = [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(4, 12)]
    ref = model(tokens, use_cache=False).logits[:, 4:]
    assert relative_error(torch.cat(steps, dim=1), ref) < 1e-4


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
