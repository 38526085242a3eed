"""A_log and dt_bias in 16 bits: what rounding leaves out is kept by whatever rounds, saves, loads and copies."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from helpers import relative_error
from model_helpers import random_tokens, tiny_model
from torch import Tensor, nn

from gka import GatedKalmaNet, GKAForCausalLM
from gka.nn.decay import UNDECAYED, with_rests

NARROW = [torch.bfloat16, torch.float16]


def layer_of(dtype: torch.dtype | None = None, seed: int = 0) -> GatedKalmaNet:
    torch.manual_seed(seed)
    return GatedKalmaNet(12, 3, dtype=dtype)


def decay_of(layer: GatedKalmaNet) -> list[Tensor]:
    return [layer.decay_parameter(name, torch.float32).detach() for name in UNDECAYED]


def assert_same_decay(layer: GatedKalmaNet, other: GatedKalmaNet) -> None:
    for name, mine, theirs in zip(UNDECAYED, decay_of(layer), decay_of(other), strict=True):
        assert torch.equal(mine, theirs), name


def assert_narrow(layer: GatedKalmaNet, dtype: torch.dtype) -> None:
    """All parameters are of that dtype, and without the rests the decay is another."""
    assert {value.dtype for value in layer.parameters()} == {dtype}
    for name, whole in zip(UNDECAYED, decay_of(layer), strict=True):
        rest = getattr(layer, f"{name}_rest")
        assert rest.dtype == torch.float32 and not torch.equal(getattr(layer, name).float(), whole), name
        assert getattr(layer, name)._no_weight_decay is True


@pytest.mark.parametrize("dtype", NARROW)
def test_rounded_and_back(dtype: torch.dtype) -> None:
    first = layer_of()
    assert first.A_log_rest is None and first.dt_bias_rest is None
    layer = copy.deepcopy(first).to(dtype)
    assert_narrow(layer, dtype)
    for change in (lambda x: x.to(dtype), lambda x: x.to("cpu"), copy.deepcopy, lambda x: x.to(torch.bfloat16)):
        layer = change(layer)
        assert_same_decay(layer, first)
    layer = layer.float()
    assert_same_decay(layer, first)
    assert layer.A_log_rest is None and torch.equal(layer.A_log, first.A_log)


@pytest.mark.parametrize("dtype", NARROW)
def test_made_in_that_dtype(dtype: torch.dtype) -> None:
    assert_narrow(layer_of(dtype), dtype)
    torch.set_default_dtype(dtype)
    try:
        assert_narrow(layer_of(), dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    meta = GatedKalmaNet(12, 3, device="meta").to(dtype)
    assert {value.dtype for value in meta.parameters()} == {dtype}
    torch.manual_seed(0)
    made = meta.to_empty(device="cpu")
    made.reset_parameters()
    assert_narrow(made, dtype)


def saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("source", [None, *NARROW])
@pytest.mark.parametrize("target", [None, *NARROW])
def test_state_dicts_load_into_every_dtype(
    source: torch.dtype | None, target: torch.dtype | None, assign: bool
) -> None:
    first, layer = layer_of(source), layer_of(target, seed=1)
    layer.load_state_dict(saved(first.state_dict()), assign=assign)
    assert_same_decay(layer, first)
    assert layer.A_log.dtype == (target or torch.float32)


def test_a_state_dict_without_rests_is_all_there_is() -> None:
    old = {name: value for name, value in layer_of(torch.bfloat16).state_dict().items() if "rest" not in name}
    layer = layer_of(torch.bfloat16, seed=1)
    assert layer.A_log_rest is not None
    layer.load_state_dict(old)
    assert torch.equal(decay_of(layer)[0], old["A_log"].float())
    with pytest.raises(RuntimeError, match="size mismatch for A_log"):
        layer.load_state_dict({**old, "A_log": torch.zeros(2)})
    with pytest.raises(RuntimeError, match=r"Missing key.*A_log"):
        layer.load_state_dict({name: value for name, value in old.items() if name != "A_log"})


def test_without_a_forget_gate_there_is_nothing_to_keep() -> None:
    layer = GatedKalmaNet(12, 3, use_forget_gate=False)
    layer.to(torch.bfloat16).load_state_dict(layer.state_dict())
    assert not any("rest" in name for name in layer.state_dict())


def test_infinity_has_no_rest() -> None:
    layer = layer_of()
    with torch.no_grad():
        layer.A_log.fill_(-torch.inf)
    assert torch.equal(decay_of(layer.to(torch.bfloat16))[0], torch.full((3,), -torch.inf))


def test_with_rests_is_the_float32_of_a_whole_model() -> None:
    first = tiny_model("hybrid", torch.float32)
    model = copy.deepcopy(first).to(torch.bfloat16)
    for held in (model.state_dict(), {n: v for n, v in model.state_dict().items() if "rest" not in n}):
        merged = with_rests(held, model)
        assert merged.keys() == first.state_dict().keys()
        for name, value in first.state_dict().items():
            if name.endswith(UNDECAYED):
                assert torch.equal(merged[name], value), name


@torch.no_grad()
def test_logits_are_those_of_a_float32_decay(tmp_path: Any) -> None:
    """A model loaded in bfloat16, and the same with its decay in float32; without the rests it is far from it."""
    torch.manual_seed(0)
    tiny_model("gka", torch.float32).save_pretrained(tmp_path)
    tokens = random_tokens(2, 60)
    model = GKAForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    logits = model(tokens).logits.float()
    wide = copy.deepcopy(model)
    first = GKAForCausalLM.from_pretrained(tmp_path)
    for mine, theirs in zip(wide.model.layers, first.model.layers, strict=True):
        for name in UNDECAYED:
            setattr(mine.gka, name, nn.Parameter(getattr(theirs.gka, name).data))
            setattr(mine.gka, f"{name}_rest", None)
    expected = wide(tokens).logits.float()
    assert relative_error(logits, expected) < 3e-3
    for block in model.model.layers:
        block.gka.A_log_rest = block.gka.dt_bias_rest = None
    assert relative_error(model(tokens).logits.float(), expected) > 5e-3
