"""The layer without a model: plain arguments, first weights, states passed and returned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close
from model_helpers import assert_near, new_cache, random_inputs, tiny_config, tiny_layer

from gka import GatedKalmaNet, GKAForCausalLM, LayerState


@pytest.mark.parametrize(
    "changes", [{}, {"initializer_range": None}, {"kv_proj_rank": 3, "kv_learnable_residual": True}]
)
def test_starts_as_the_same_layer_in_a_model(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    inner = GKAForCausalLM(config).model.layers[1].gka
    torch.manual_seed(5)
    inner.reset_parameters()
    torch.manual_seed(5)
    alone = GatedKalmaNet.from_config(config, 1)
    torch.manual_seed(5)
    alone.reset_parameters()
    found = dict(alone.named_parameters())
    for name, value in inner.named_parameters():
        assert torch.equal(found[name], value), name


def test_a_model_gives_its_layers_the_first_weights_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[dict[str, Any]] = []
    reset = GatedKalmaNet.reset_parameters

    def recorded(layer: GatedKalmaNet) -> None:
        reset(layer)
        kept.append({name: value.clone() for name, value in layer.named_parameters()})

    monkeypatch.setattr(GatedKalmaNet, "reset_parameters", recorded)
    model = GKAForCausalLM(tiny_config(initializer_range=None))
    for name, value in model.model.layers[1].gka.named_parameters():
        assert torch.equal(kept[-1][name], value), name


def test_plain_arguments() -> None:
    layer = GatedKalmaNet(36, 4, 2, 10, conv_size=3, use_v_conv=False, solve=False, dtype=torch.float64)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    assert layer.q_proj.weight.shape == (40, 36) and layer.k_proj.weight.shape == (20, 36)
    assert layer.alpha_proj is None and layer.v_conv1d is None and layer.solver_steps == ()
    assert GatedKalmaNet(8, 2, device="meta").A_log.device.type == "meta"
    with pytest.raises(ValueError, match=r"solver is 'cg'.*with solve=False"):
        GatedKalmaNet(8, 2, solve=False, solver="cg")
    with pytest.raises(ValueError, match="solver_steps is 20; expected None or integers"):
        GatedKalmaNet(8, 2, solver_steps=20)
    std = GatedKalmaNet(400, 2).q_proj.weight.std().item()
    assert abs(std - 400**-0.5) < 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 5}, "hidden_size is 36; expected a multiple of num_heads, 5"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3; expected a divisor of num_heads, 4"),
        ({"head_dim": 257}, "head_dim is 257; expected at most 256"),
        ({"conv_size": 0}, "conv_size is 0; expected an integer"),
        ({"ridge_ratio": -1.0}, "ridge_ratio is -1.0"),
        ({"solver": "lu"}, "solver is 'lu'"),
        ({"tolerance": 0.1}, "tolerance is 0.1"),
        ({"solver_steps": []}, r"solver_steps is \[\]"),
        ({"kv_proj_rank": 2}, "kv_proj_rank is 2; expected None"),
        ({"kv_learnable_residual": True}, "kv_learnable_residual is True"),
        ({"layer_idx": -1}, "layer_idx is -1"),
    ],
)
def test_refuses_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedKalmaNet(**{"hidden_size": 36, "num_heads": 4, **arguments})


def test_a_cache_needs_a_layer_idx() -> None:
    """So two layers made by default cannot share a place; those with places of their own go on from it."""
    cache, x = new_cache(tiny_config()), random_inputs(1, 7, 36).float()
    for layer in (GatedKalmaNet.from_config(tiny_config()), GatedKalmaNet(36, 4)):
        with pytest.raises(ValueError, match="layer_idx is None"):
            layer(x, past_key_values=cache)
    for index in range(2):
        layer = GatedKalmaNet.from_config(tiny_config(), index)
        parts = [layer(part, past_key_values=cache) for part in x.split([4, 3], dim=1)]
        assert_near(torch.cat(parts, dim=1), layer(x), 1e-4)


@pytest.mark.parametrize("changes", [{}, {"use_v_conv": False}, {"mixer": "gla"}, {"conv_size": 1}], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_continues_from_a_state(changes: dict[str, Any], grad: bool) -> None:
    layer, x = tiny_layer(**changes), random_inputs(2, 9, 36)
    with torch.set_grad_enabled(grad):
        state, parts = None, []
        for part in x.split([3, 1, 0, 1, 4], dim=1):
            before = None if state is None else [tensor.clone() for tensor in (*state.conv, state.state[1])]
            out, new = layer(part, state=state, return_state=True)
            if before is not None:
                assert all(torch.equal(a, b) for a, b in zip(before, (*state.conv, state.state[1]), strict=True))
            state = new
            parts.append(out)
        assert_near(torch.cat(parts, dim=1), layer(x), 1e-10)


def test_gradients_flow_through_the_state() -> None:
    layer, outcomes = tiny_layer(), []
    for cut in (False, True):
        x = random_inputs(2, 7, 36).requires_grad_()
        if cut:
            _, state = layer(x[:, :5], return_state=True)
            out = layer(x[:, 5:], state=[state.conv, tuple(state.state)])
        else:
            out = layer(x)[:, 5:]
        (grad,) = torch.autograd.grad(out, x, random_inputs(2, 2, 36, seed=3))
        outcomes.append({"out": out, "dx": grad})
    assert_close(outcomes[1], outcomes[0], 1e-10)


def test_refuses_states() -> None:
    layer, x = tiny_layer(), random_inputs(2, 3, 36)
    _, state = layer(x, return_state=True)
    for wrong, error, message in (
        (x, TypeError, "state is a Tensor; expected a pair"),
        ((state.conv,), ValueError, "state has 1 parts"),
        ((state.conv[:2], state.state), ValueError, "state.conv has 2 parts"),
        ((state.conv, x), TypeError, "state.state is a Tensor"),
        ((state.conv, [x, x]), ValueError, "S_kv has shape"),
        (LayerState([x, x, x], state.state), ValueError, r"state.conv\[0\] has shape"),
    ):
        with pytest.raises(error, match=message):
            layer(x, state=wrong)
    with pytest.raises(ValueError, match="both given"):
        layer(x, state=state, past_key_values=new_cache(tiny_config()))
    with pytest.raises(ValueError, match="return_state"):
        layer(x[:1], return_state=True, cu_seqlens=torch.tensor([0, 3]))
