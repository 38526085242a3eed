"""The configuration: what it fills in, what it refuses, and that a file does not weaken it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import FULL, GKA, SLIDING, tiny_config
from transformers import AutoConfig, DynamicCache

from gka import GatedKalmaNet, GKAConfig, GKAForCausalLM

BAD: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": 0}, "vocab_size is 0; expected an integer of at least 1"),
    ({"hidden_size": "36"}, "hidden_size is '36'; expected an integer"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True; expected an integer"),
    ({"hidden_size": 37, "head_dim": None}, "hidden_size is 37; expected a multiple of num_attention_heads, 4"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3; expected a divisor of num_attention_heads, 4"),
    ({"head_dim": 257}, "head_dim is 257; expected at most 256"),
    ({"head_dim": 9, "layer_types": [GKA, FULL]}, "head_dim is 9; expected an even number"),
    ({"layer_types": [GKA, "attention"]}, "layer_types is .*; expected a list of linear_attention"),
    ({"layer_types": [GKA]}, "layer_types is .*; expected one entry for each of num_hidden_layers = 2"),
    ({"layer_types": GKA}, "layer_types is 'linear_attention'; expected a list"),
    ({"layer_types": [GKA, SLIDING]}, "sliding_window is None; expected a number of tokens"),
    ({"layer_types": [GKA, SLIDING], "sliding_window": 0}, "sliding_window is 0; expected an integer"),
    ({"mixer": "mamba"}, r"mixer is 'mamba'; expected one of \('gka', 'gla'.*\), or a layer given to"),
    ({"ridge_ratio": 0.0}, "ridge_ratio is 0.0; expected a finite number greater than 0"),
    ({"ridge_ratio": float("nan")}, "ridge_ratio is nan; expected a finite number"),
    ({"ridge_ratio": None}, "ridge_ratio is None; expected a finite number"),
    ({"solver_steps": []}, r"solver_steps is \[\]; expected None or a list"),
    ({"solver_steps": [16, 0]}, r"solver_steps is \[16, 0\]; expected None or a list of integers of at least 1"),
    ({"solver": "lu"}, r"solver is 'lu'; expected one of"),
    ({"tolerance": 0.1}, "tolerance is 0.1; expected None with solver='chebyshev'"),
    ({"solver": "cg", "tolerance": 2.0}, "tolerance is 2.0; expected None or a number between 0 and 1"),
    ({"solver": "cg", "mixer": "gla"}, "solver is 'cg'; expected 'chebyshev' with mixer='gla'"),
    ({"solver_steps": 31}, "solver_steps is 31; expected None or a list"),
    ({"solver_steps": [31], "mixer": "gla"}, r"solver_steps is \[31\]; expected None with mixer='gla'"),
    ({"chunk_size": 0}, "chunk_size is 0; expected an integer"),
    ({"conv_size": 0}, "conv_size is 0; expected an integer"),
    ({"use_beta_gate": 1}, "use_beta_gate is 1; expected True or False"),
    ({"attention_dropout": 1.0}, "attention_dropout is 1.0; expected a number of at least 0"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0; expected a finite number greater than 0"),
    ({"hidden_act": "swish?"}, "hidden_act is 'swish\\?'; expected one of"),
    ({"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]; expected one of"),
    ({"kv_proj_rank": 0}, "kv_proj_rank is 0; expected an integer"),
    ({"kv_proj_rank": 2, "num_key_value_heads": 4}, "kv_proj_rank is 2; expected None where there are as many"),
    ({"kv_learnable_residual": True}, "kv_learnable_residual is True; expected False without kv_proj_rank"),
    ({"pad_token_id": 61}, "pad_token_id is 61; expected None or a token id less than vocab_size, 61"),
    ({"ridge_ration": 0.1}, "ridge_ration is no field of GKAConfig; expected ridge_ratio"),
    ({"num_heads": 2}, "num_heads is no field of GKAConfig; expected num_attention_heads"),
    ({"layers": 2}, "layers is no field of GKAConfig; expected num_hidden_layers"),
    ({"use_forgetting_gate": False}, "use_forgetting_gate is no field of GKAConfig; expected use_forget_gate"),
]


def bad_id(case: Any) -> str:
    return ",".join(f"{name}={value}" for name, value in case.items()) if isinstance(case, dict) else ""


@pytest.mark.parametrize(("change", "message"), BAD, ids=bad_id)
def test_refuses(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**{"num_hidden_layers": 2, **change})
    fields = {**tiny_config().to_dict(), **change}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        GKAConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("make", [GKAForCausalLM, GatedKalmaNet.from_config])
def test_fields_set_later_are_checked_too(make: Any) -> None:
    config = tiny_config()
    config.ridge_ratio = -1.0
    with pytest.raises(ValueError, match=r"ridge_ratio is -1\.0"):
        make(config)


def test_fills_in() -> None:
    config = GKAConfig()
    assert (config.num_key_value_heads, config.head_dim) == (8, 128)
    assert config.layer_types == [GKA] * 28 and not config.has_attention
    assert GKAConfig(num_hidden_layers=2, layer_types=[GKA, FULL]).has_attention
    assert GKAConfig(solver_steps=(16, 16)).solver_steps == [16, 16]


def test_loads_solver_steps_saved_under_their_former_name(tmp_path: Path) -> None:
    fields = tiny_config(solver_steps=[16, 8]).to_dict()
    fields["steps"] = fields.pop("solver_steps")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for loader in (GKAConfig, AutoConfig):
        config = loader.from_pretrained(tmp_path)
        assert config.solver_steps == [16, 8] and not hasattr(config, "steps")
    assert GKAConfig.from_pretrained(tmp_path, solver_steps=[5]).solver_steps == [5]
    with pytest.raises(ValueError, match="steps is no field of GKAConfig; expected solver_steps"):
        tiny_config(steps=[16, 8])


def test_does_not_write_to_what_it_was_given() -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    given = dict(rope)
    assert tiny_config("hybrid", rope_parameters=given).rope_parameters["rope_theta"] == 5e5
    assert given == rope


def test_round_trip(tmp_path: Path) -> None:
    config = tiny_config(
        "hybrid, sliding",
        solver_steps=[16, 8],
        ridge_ratio=0.05,
        conv_size=3,
        chunk_size=16,
        use_v_conv=False,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
    )
    config.save_pretrained(tmp_path)
    assert GKAConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_caches_are_made_from_it() -> None:
    cache = DynamicCache(config=tiny_config("hybrid, all three"))
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["DynamicSlidingWindowLayer", "LinearAttentionLayer", "DynamicLayer"]
    assert cache.layers[1].number_of_states == 3 and cache.layers[0].sliding_window == 3


def test_first_weights_have_the_size_that_the_width_asks() -> None:
    torch.manual_seed(0)
    config = GKAConfig(
        vocab_size=97, hidden_size=96, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    weights = dict(GKAForCausalLM(config).named_parameters())
    outputs = [name for name in weights if name.endswith(("o_proj.weight", "down_proj.weight"))]
    assert len(outputs) == 6
    for name in ("embed_tokens.weight", "layers.0.gka.q_proj.weight", "layers.1.mlp.up_proj.weight"):
        assert weights[f"model.{name}"].std().item() == pytest.approx(96**-0.5, rel=0.1)
    for name in outputs:
        assert weights[name].std().item() == pytest.approx((6 * 96) ** -0.5, rel=0.1)


def test_loaded_weights_keep_their_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GKAForCausalLM(GKAConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    model.save_pretrained(tmp_path)
    loaded = GKAForCausalLM.from_pretrained(tmp_path)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    fewer = GKAForCausalLM.from_pretrained(tmp_path, num_hidden_layers=1, layer_types=["linear_attention"])
    assert torch.equal(fewer.model.layers[0].gka.o_proj.weight, model.model.layers[0].gka.o_proj.weight)
