"""The layer: its equations, its parameters, its switches, and what it refuses."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, relative_error
from model_helpers import assert_near, new_cache, random_inputs, tiny_config, tiny_layer, tiny_model
from torch import Tensor
from transformers import DynamicCache

from gka import GatedKalmaNet, GKAConfig, GKAForCausalLM
from gka.ops import State, gated_kalmanet


def plain_layer(layer: GatedKalmaNet, x: Tensor, **op_options: Any) -> Tensor:
    """The layer's equations written out, one token and one convolution tap after the other, in float64."""
    W = {name: value.detach().double() for name, value in layer.named_parameters()}
    B, T, _ = x.shape

    def convolved(name: str) -> Tensor:
        inputs, taps = x @ W[f"{name}_proj.weight"].T, W[f"{name}_conv1d.weight"][:, 0]
        out = torch.zeros_like(inputs)
        for t in range(T):
            for j in range(taps.shape[1]):
                if t - j >= 0:
                    out[:, t] += taps[:, -1 - j] * inputs[:, t - j]
        out = out * torch.sigmoid(out)
        return out.view(B, T, -1, layer.head_dim)

    q, k, v = (convolved(name) for name in "qkv")
    q, k = (u / (u.norm(dim=-1, keepdim=True) + 1e-6) for u in (q, k))
    g = -W["A_log"].exp() * torch.log1p(torch.exp(x @ W["a_proj.weight"].T + W["dt_bias"]))
    beta = torch.sigmoid(x @ W["b_proj.weight"].T + W["b_proj.bias"]) + 1e-6
    alpha = torch.sigmoid(x @ W["alpha_proj.weight"].T + W["alpha_proj.bias"])
    o, _ = gated_kalmanet(q, k, v, g, alpha, beta, ridge_ratio=layer.ridge_ratio, **op_options)
    gate = (x @ W["g_proj.weight"].T).view_as(o)
    o = o / torch.sqrt((o * o).mean(-1, keepdim=True) + layer.o_norm.eps) * W["o_norm.weight"]
    return (o * gate * torch.sigmoid(gate)).flatten(2) @ W["o_proj.weight"].T


@pytest.mark.parametrize("T", [1, 3, 45])
def test_computes_its_equations(T: int) -> None:
    layer, x = tiny_layer(), random_inputs(2, T, 36)
    assert_near(layer(x), plain_layer(layer, x, backend="reference", solver_steps=(31,)), 1e-10)


def test_a_higher_degree_comes_to_the_exact_solve() -> None:
    x = random_inputs(2, 21, 36)
    layer = tiny_layer(solver_steps=[120])
    assert_near(layer(x), plain_layer(layer, x, backend="reference", solver_steps=(400,)), 1e-6)


def test_chunk_size_does_not_matter() -> None:
    x = random_inputs(2, 45, 36)
    assert_near(tiny_layer(chunk_size=7)(x), tiny_layer(chunk_size=64)(x), 1e-10)


def test_parameters_are_those_of_the_published_checkpoints() -> None:
    config = GKAConfig(
        hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128, num_hidden_layers=1
    )
    with torch.device("meta"):
        layer = GatedKalmaNet.from_config(config)
    expected = {
        **{f"{name}_proj.weight": (4096, 4096) for name in "qgo"},
        **{f"{name}_proj.weight": (1024, 4096) for name in "kv"},
        **{f"{name}_proj.weight": (32, 4096) for name in ("a", "b", "alpha")},
        **{f"{name}_proj.bias": (32,) for name in ("b", "alpha")},
        "A_log": (32,),
        "dt_bias": (32,),
        "q_conv1d.weight": (4096, 1, 4),
        **{f"{name}_conv1d.weight": (1024, 1, 4) for name in "kv"},
        "o_norm.weight": (128,),
    }
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == expected


SWITCHES: dict[str, tuple[Any, set[str]]] = {
    "use_v_conv": (False, {"v_conv1d.weight"}),
    "use_alpha_connection": (False, {"alpha_proj.weight", "alpha_proj.bias"}),
    "use_beta_gate": (False, {"b_proj.weight", "b_proj.bias"}),
    "use_forget_gate": (False, {"a_proj.weight", "A_log", "dt_bias"}),
    "use_output_gate": (False, {"g_proj.weight"}),
    "mixer": ("gla", {"alpha_proj.weight", "alpha_proj.bias"}),
}


@pytest.mark.parametrize("switch", list(SWITCHES))
def test_a_switch_takes_its_part_away(switch: str) -> None:
    value, missing = SWITCHES[switch]
    full, layer, x = tiny_layer(), tiny_layer(**{switch: value}), random_inputs(2, 9, 36)
    assert set(full.state_dict()) - set(layer.state_dict()) == missing
    layer.load_state_dict({name: weight for name, weight in full.state_dict().items() if name not in missing})
    assert relative_error(layer(x), full(x)) > 1e-3


@pytest.mark.parametrize("switch", ["use_alpha_connection", "use_beta_gate", "use_forget_gate", "mixer"])
def test_without_its_gate_is_with_the_gate_at_its_end(switch: str) -> None:
    value, missing = SWITCHES[switch]
    full, layer, x = tiny_layer(), tiny_layer(**{switch: value}), random_inputs(2, 9, 36)
    layer.load_state_dict({name: weight for name, weight in full.state_dict().items() if name not in missing})
    with torch.no_grad():
        if switch == "use_forget_gate":
            full.A_log.fill_(-math.inf)
        else:
            projection = full.b_proj if switch == "use_beta_gate" else full.alpha_proj
            projection.weight.zero_()
            projection.bias.fill_(-math.inf if switch == "mixer" else math.inf)
    assert_near(layer(x), full(x), 1e-5 if switch == "use_beta_gate" else 1e-10)  # beta has a floor of 1e-6


def test_v_without_its_convolution_is_linear_in_the_input() -> None:
    layer, x = tiny_layer(use_v_conv=False), random_inputs(1, 5, 36)
    _, _, v, _ = layer._qkv(x, None, None)
    assert_near(v, layer.v_proj(x).unflatten(2, (-1, 10)), 1e-12)


def test_ridge_ratio_and_steps_reach_the_op() -> None:
    x = random_inputs(2, 20, 36)
    standard = tiny_layer()(x)
    for change in ({"ridge_ratio": 0.1}, {"solver_steps": [5]}):
        assert relative_error(tiny_layer(**change)(x), standard) > 1e-4


def test_initial_gates() -> None:
    torch.manual_seed(0)
    model = GKAForCausalLM(tiny_config(hidden_size=32, head_dim=2, num_attention_heads=512))
    layer = model.model.layers[0].gka
    A, dt = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert 0.0 < A.min() and A.max() <= 16.0
    assert abs(A.mean().item() - 8.0) < 0.8
    assert 0.99e-3 <= dt.min() and dt.max() <= 1.01e-1
    assert abs(dt.log().mean().item() - math.log(1e-2)) < 0.2


def marks(module: torch.nn.Module) -> set[str]:
    return {name for name, value in module.named_parameters() if getattr(value, "_no_weight_decay", False)}


def test_weight_decay_marks_survive_whatever_replaces_parameters(tmp_path: Any) -> None:
    layer, expected = GatedKalmaNet.from_config(tiny_config()), {"A_log", "dt_bias"}
    assert marks(layer) == expected
    assert marks(copy.deepcopy(layer)) == expected
    assert marks(pickle.loads(pickle.dumps(layer))) == expected
    assert marks(layer.to(torch.bfloat16)) == expected
    layer.load_state_dict(layer.state_dict(), assign=True)
    assert marks(layer) == expected
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = GKAForCausalLM.from_pretrained(tmp_path)
    assert marks(loaded) == {f"model.layers.{i}.gka.{name}" for i in (0, 1) for name in expected}


def output_and_gradients(layer: GatedKalmaNet, x: Tensor) -> dict[str, Tensor]:
    """The layer's output, and the gradients of its mean square in the parameters."""
    layer.zero_grad()
    out = layer(x)
    out.square().mean().backward()
    return {"out": out.detach(), **{name: p.grad.clone() for name, p in layer.named_parameters()}}


def in_two_precisions(layer: GatedKalmaNet, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Outputs and gradients of the layer in `dtype` and, with the same weights and inputs, in float64."""
    x = random_inputs(2, 70, 36).to(dtype)
    low, high = layer.to(dtype), copy.deepcopy(layer.to(dtype)).double()
    found, exact = output_and_gradients(low, x), output_and_gradients(high, x.double())
    assert all(value.dtype == dtype for value in found.values())
    return {name: (found[name], exact[name]) for name in exact}


def effect_of_rounding(layer: GatedKalmaNet, dtype: torch.dtype) -> dict[str, float]:
    """Root mean square, over four trials, of the relative change of all outputs and gradients in float64 where
    inputs and parameters change at random by as much as rounding once to `dtype` may change them."""
    generator, unit = torch.Generator().manual_seed(0), torch.finfo(dtype).eps / 4

    def changed(value: Tensor) -> Tensor:
        return value * (1.0 + unit * torch.randn(value.shape, generator=generator, dtype=torch.float64))

    layer, x = copy.deepcopy(layer.to(dtype)).double(), random_inputs(2, 70, 36).to(dtype).double()
    exact, squares = output_and_gradients(layer, x), dict.fromkeys(["out", *dict(layer.named_parameters())], 0.0)
    for _ in range(4):
        trial = copy.deepcopy(layer)
        with torch.no_grad():
            for parameter in trial.parameters():
                parameter.copy_(changed(parameter))
        found = output_and_gradients(trial, changed(x))
        for name in squares:
            squares[name] += relative_error(found[name], exact[name]) ** 2 / 4
    return {name: math.sqrt(square) for name, square in squares.items()}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_close(dtype: torch.dtype, seed: int) -> None:
    """Gradients that are sums which nearly cancel have errors that differ a lot by draw of the weights. So has
    what rounding weights and inputs once changes, which no layer avoids; the errors of 24 draws were at most 1.4
    times that. The solve is exact here: where it is truncated, that may be the larger error.
    """
    layer = tiny_layer(seed=seed, solver_steps=[100])
    unavoidable = effect_of_rounding(layer, dtype)
    for name, (low, high) in in_two_precisions(layer, dtype).items():
        assert_near(low, high, 2.0 * unavoidable[name], name)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1.5e-2), (torch.float16, 7e-3)])
def test_default_steps_suit_16_bits(dtype: torch.dtype, bound: float, seed: int) -> None:
    """The outputs of these draws are off by up to 8.0e-3 and 3.8e-3; in float16 most of it is truncation."""
    low, high = in_two_precisions(tiny_layer(seed=seed), dtype)["out"]
    assert_near(low, high, bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dt_bias", [-20.0, 20.0])
def test_16_bits_are_finite_at_the_ends(dtype: torch.dtype, dt_bias: float) -> None:
    layer = tiny_layer()
    with torch.no_grad():  # steps from nearly 0 to far beyond what exp can take in 16 bits
        layer.A_log.fill_(math.log(16.0))
        layer.dt_bias.fill_(dt_bias)
    for name, (low, _) in in_two_precisions(layer, dtype).items():
        assert low.isfinite().all(), name


def test_gates_are_computed_in_at_least_32_bits() -> None:
    layer, x = tiny_layer().bfloat16(), random_inputs(1, 4, 36).bfloat16()
    assert {gate.dtype for gate in layer._gates(x, None)} == {torch.float32}
    assert {gate.dtype for gate in layer.double()._gates(x.double(), None)} == {torch.float64}


def test_no_tokens() -> None:
    layer, config = tiny_layer(), tiny_config()
    cache = new_cache(config)
    assert layer(random_inputs(2, 0, 36), past_key_values=cache).shape == (2, 0, 36)
    assert not cache.has_previous_state(0)


def test_what_is_printed_shows_sizes_and_settings() -> None:
    layer = GatedKalmaNet(24, 3, solver="cg", tolerance=0.1, layer_idx=2)
    assert repr(layer).splitlines()[1].strip() == (
        "24, num_heads=3, num_kv_heads=3, head_dim=8, conv_size=4, solver='cg', solver_steps=None, "
        "tolerance=0.1, layer_idx=2"
    )
    assert "(o_norm): GatedRMSNorm(8, eps=1e-06)" in repr(layer)
    assert "solve=False" in repr(GatedKalmaNet(24, 3, solve=False))
    _, state = layer(torch.zeros(2, 5, 24), return_state=True)
    sums = "State(S_kk=[2, 3, 8, 8] float32 cpu, S_kv=[2, 3, 8, 8] float32 cpu)"
    assert repr(state) == f"LayerState(conv=[{', '.join(3 * ['[2, 24, 3] float32 cpu'])}], state={sums})"
    assert repr(State(None, torch.zeros(1, 2).bfloat16())) == "State(S_kk=None, S_kv=[1, 2] bfloat16 cpu)"
    dims = State(0, 1)  # type: ignore[arg-type]  # of torch.func.vmap
    assert repr(dims) == "State(S_kk=0, S_kv=1)"
    assert repr(type(state)(None, dims)) == "LayerState(conv=None, state=State(S_kk=0, S_kv=1))"  # type: ignore[arg-type]


def test_a_state_moves_to_a_device() -> None:
    layer = GatedKalmaNet(24, 3)
    _, state = layer(torch.ones(2, 5, 24), return_state=True)
    moved = state.to("meta")
    assert all(x.device.type == "meta" for x in (*moved.conv, *moved.state))
    assert all(torch.equal(a, b) for a, b in zip(state.to("cpu").state, state.state, strict=True))
    assert State(None, torch.zeros(2)).to("meta").S_kk is None


def test_width_one_convolution() -> None:
    layer, x = tiny_layer(conv_size=1), random_inputs(2, 9, 36)
    cache = new_cache(tiny_config(conv_size=1))
    parts = [layer(part, past_key_values=cache) for part in x.split([4, 1, 4], dim=1)]
    assert_near(torch.cat(parts, dim=1), layer(x), 1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_as_one_graph(masked: bool) -> None:
    torch._dynamo.reset()
    layer, x = tiny_layer(), random_inputs(2, 19, 36)
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[0, :5] = 0
    mask[1, 7:9] = 0
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        out = function(leaf, mask) if masked else function(leaf)
        out.square().sum().backward()
        grads = {name: value.grad.clone() for name, value in layer.named_parameters()}
        results.append({"out": out, "dx": leaf.grad, **grads})
    assert_close(results[1], results[0], 1e-10)


def test_compiles_with_packed_sequences() -> None:
    torch._dynamo.reset()
    layer, x = tiny_layer(), random_inputs(1, 19, 36)
    edges = torch.tensor([0, 3, 3, 12, 19])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x, cu_seqlens=edges), layer(x, cu_seqlens=edges), 1e-10)


def bad_calls() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    config = tiny_config()
    edges = torch.tensor([0, 4, 7])
    other = DynamicCache(config=tiny_config("hybrid, attention first"))
    recording = new_cache(config)
    recording.activate_past_recording()
    return {
        "dims": (dict(hidden_states=random_inputs(7, 36)), ValueError, r"hidden_states has shape \(7, 36\)"),
        "width": (dict(hidden_states=random_inputs(1, 7, 35)), ValueError, r"expected \[B, T, 36\]"),
        "dtype": (
            dict(hidden_states=random_inputs(1, 7, 36).bfloat16()),
            TypeError,
            "hidden_states has dtype torch.bfloat16; expected that of the weights, torch.float64",
        ),
        "array": (dict(hidden_states=[[0.0]]), TypeError, "hidden_states is a list; expected a torch.Tensor"),
        "list as a mask": (
            dict(attention_mask=[[1] * 7]),
            TypeError,
            "attention_mask is a list; expected a torch.T",
        ),
        "not finite": (
            dict(hidden_states=random_inputs(1, 7, 36) * torch.nan),
            ValueError,
            r"g has a value of nan.*is an input or a weight not finite\?",
        ),
        "mask": (dict(attention_mask=torch.ones(1, 8)), ValueError, r"attention_mask has shape \(1, 8\)"),
        "state of the op": (
            dict(state=State(torch.zeros(1), torch.zeros(1))),
            TypeError,
            "state is a State, the sums of the op; expected a LayerState",
        ),
        "packed mask": (
            dict(cu_seqlens=edges, attention_mask=torch.ones(1, 7)),
            ValueError,
            "leave padding out",
        ),
        "packed cache": (dict(cu_seqlens=edges, past_key_values=new_cache(config)), ValueError, "as rows, padded"),
        "packed rows": (
            dict(hidden_states=random_inputs(2, 7, 36), cu_seqlens=edges),
            ValueError,
            "expected 1 with cu_seqlens",
        ),
        "packed list": (dict(cu_seqlens=[0, 7]), TypeError, "cu_seqlens is a list"),
        "packed end": (dict(cu_seqlens=torch.tensor([0, 6])), ValueError, "cu_seqlens"),
        "cache without config": (dict(past_key_values=DynamicCache()), ValueError, r"config=model\.config"),
        "cache of another model": (dict(past_key_values=other), ValueError, r"config=model\.config"),
        "cache as a tuple": (dict(past_key_values=()), TypeError, r"a tuple; expected a transformers\.Cache"),
        "cache to roll back": (dict(past_key_values=recording), ValueError, "cannot be rolled back"),
    }


@pytest.mark.parametrize("name", list(bad_calls()))
def test_refuses(name: str) -> None:
    arguments, error, message = bad_calls()[name]
    with pytest.raises(error, match=message):
        tiny_layer()(**{"hidden_states": random_inputs(1, 7, 36), **arguments})


def test_projections_that_cast_their_input_take_any_dtype() -> None:
    layer, x = tiny_layer(), random_inputs(1, 7, 36).float()
    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, given: (given[0].to(module.weight.dtype),))
    assert_near(layer(x), tiny_layer()(x.double()), 1e-6)  # gates in float32


def test_refuses_a_cache_of_another_batch() -> None:
    layer, cache = tiny_layer(), new_cache(tiny_config())
    layer(random_inputs(2, 3, 36), past_key_values=cache)
    with pytest.raises(ValueError, match="has 3 rows and past_key_values 2"):
        layer(random_inputs(3, 1, 36), past_key_values=cache)
