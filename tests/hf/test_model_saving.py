"""Saving and loading, tied embeddings, the Auto classes, and what importing the package brings along."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_helpers import FULL, KINDS, SLIDING, random_tokens, tiny_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gka import GKAConfig, GKAForCausalLM, GKAForSequenceClassification, GKAModel


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_round_trip(kind: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokens = tiny_model(kind, dtype, tie_word_embeddings=tied), random_tokens(2, 9)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) != tied
    for name, value in stored.items():
        assert value.dtype == (torch.float32 if name.endswith(("A_log", "dt_bias")) else dtype), name
    assert not any(name.endswith("_rest") for name in stored)
    loaded, report = GKAForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == dtype and loaded.config.to_dict() == {
        **model.config.to_dict(),
        "_name_or_path": str(tmp_path),
    }
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_tied_embeddings_are_one_matrix(tmp_path: Path) -> None:
    model, tokens = tiny_model(tie_word_embeddings=True).train(), random_tokens(2, 9)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model(tokens, labels=tokens).loss.backward()
    before = model.lm_head.weight.detach().clone()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(before, model.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, model.lm_head.weight)
    model.save_pretrained(tmp_path)
    loaded = GKAForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tiny_model(tie_word_embeddings=False).lm_head.weight is not None
    apart = tiny_model(tie_word_embeddings=False)
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight


def test_names_are_those_of_qwen3_beside_the_layer() -> None:
    names = {
        name.split(".", 3)[-1].split(".")[0] for name in tiny_model("hybrid").state_dict() if "layers" in name
    }
    assert names == {"input_layernorm", "post_attention_layernorm", "gka", "self_attn", "mlp"}
    others = {name for name in tiny_model("hybrid").state_dict() if "layers" not in name}
    assert others == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_switches_of_softmax_attention(norm: bool, bias: bool) -> None:
    model = tiny_model("hybrid", layer_types=[FULL], use_qk_norm=norm, attention_bias=bias)
    shapes = {
        name.removeprefix("model.layers.0.self_attn."): tuple(value.shape)
        for name, value in model.state_dict().items()
        if "self_attn" in name
    }
    expected = {
        "q_proj.weight": (40, 36),
        "k_proj.weight": (20, 36),
        "v_proj.weight": (20, 36),
        "o_proj.weight": (36, 40),
        **({"q_norm.weight": (10,), "k_norm.weight": (10,)} if norm else {}),
        **(
            {f"{name}_proj.bias": (size,) for name, size in zip("qkvo", (40, 20, 20, 36), strict=True)}
            if bias
            else {}
        ),
    }
    assert shapes == expected


def test_a_sliding_window_is_as_wide_as_the_configuration_says() -> None:
    model, tokens = tiny_model("hybrid, sliding", layer_types=[SLIDING]), random_tokens(1, 9)
    other = tokens.clone()
    other[0, 2] = 1 + other[0, 2] % 60
    moved = (model(tokens).logits != model(other).logits).any(dim=2)[0]
    assert moved.tolist() == [False] * 2 + [True] * 4 + [False] * 3


def test_auto_classes(tmp_path: Path) -> None:
    model = tiny_model("hybrid")
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), GKAConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), GKAModel)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), GKAForCausalLM)
    assert isinstance(GKAForSequenceClassification.from_pretrained(tmp_path), GKAForSequenceClassification)
    assert type(AutoModelForCausalLM.from_config(model.config)) is GKAForCausalLM


FRESH = """
import sys, torch
import gka
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = torch.load(sys.argv[2])
torch.save(model.generate(tokens, max_new_tokens=9, do_sample=False), sys.argv[3])
"""


def test_a_fresh_process_loads_it_after_import_gka(tmp_path: Path) -> None:
    model, tokens = tiny_model("hybrid", torch.float32), random_tokens(2, 9)
    model.save_pretrained(tmp_path / "model")
    torch.save(tokens, tmp_path / "tokens.pt")
    arguments = [str(tmp_path / name) for name in ("model", "tokens.pt", "ids.pt")]
    subprocess.run(
        [sys.executable, "-c", FRESH, *arguments], check=True, cwd=Path(__file__).parents[2], timeout=120
    )
    expected = model.generate(tokens, max_new_tokens=9, do_sample=False)
    assert torch.equal(torch.load(tmp_path / "ids.pt"), expected)


IMPORTS = """
import json, sys
import torch, transformers.models.qwen3.modeling_qwen3
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache, GenerationMixin
before = set(sys.modules)
import gka
sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
model = gka.GKAModel(gka.GKAConfig(**sizes))
model(torch.tensor([[1, 2, 3]])).last_hidden_state.sum().backward()
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_import_brings_no_triton_and_no_inductor() -> None:
    run = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    brought = json.loads(run.stdout.splitlines()[-1])
    assert "gka.nn.layer" in brought
    heavy = [name for name in brought if name.split(".")[0] == "triton" or name.startswith("torch._inductor")]
    assert not heavy
