"""PEFT: LoRA on every linear map of a model trains, merges, is saved and comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_helpers import assert_near, losses_of_training, random_tokens, tiny_model
from torch import Tensor, nn

from gka import GKAForCausalLM

peft = pytest.importorskip("peft")
LoraLayer = pytest.importorskip("peft.tuners.lora").LoraLayer

KINDS = ("gka", "hybrid", "gka, heads expanded")
SMALL = {"a_proj", "b_proj", "alpha_proj"}  # a GKA layer joins these three where nothing is attached to them


def adapted(base: GKAForCausalLM, steps: int = 25) -> tuple[peft.PeftModel, list[float]]:
    """LoRA on `base`, trained for some steps on one batch, and the losses."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model, tokens = peft.get_peft_model(base, config), random_tokens(2, 13)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = losses_of_training(model, tokens, optimizer, steps)
    return model.eval(), losses


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_trains_every_linear_map_and_nothing_else(kind: str) -> None:
    base = tiny_model(kind)
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    before = {name: value.clone() for name, value in base.named_parameters()}
    model, losses = adapted(base)
    assert losses[-1] < 0.7 * losses[0], losses
    layers = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert layers.keys() == linear
    assert {name.rsplit(".", 1)[1] for name in layers} >= SMALL
    for name, layer in layers.items():
        assert layer.lora_B["default"].weight.abs().max() > 1e-4, f"{name} has not moved"
    for name, value in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")]), f"{name} has moved"


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged(kind: str, tmp_path: Path) -> None:
    model, _ = adapted(tiny_model(kind))
    tokens = random_tokens(2, 17, seed=3)
    attached, untrained = logits(model, tokens), logits(tiny_model(kind), tokens)
    assert (attached - untrained).norm() > 0.1 * untrained.norm()
    with model.disable_adapter():
        assert_near(logits(model, tokens), untrained, 1e-6, "adapter off")
    generated = model.generate(input_ids=tokens, max_new_tokens=5, do_sample=False)
    merged = model.merge_and_unload()
    assert type(merged) is GKAForCausalLM
    assert_near(logits(merged, tokens), attached, 1e-6)
    assert torch.equal(merged.generate(tokens, max_new_tokens=5, do_sample=False), generated)
    merged.save_pretrained(tmp_path)
    again = GKAForCausalLM.from_pretrained(tmp_path)
    for name, weight in merged.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    assert_near(logits(again, tokens), logits(merged, tokens), 1e-6)  # merged weights may be laid out otherwise


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapter_comes_back(kind: str, tmp_path: Path) -> None:
    tiny_model(kind).save_pretrained(tmp_path / "base")
    model, _ = adapted(GKAForCausalLM.from_pretrained(tmp_path / "base"), steps=3)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    tokens = random_tokens(2, 17, seed=3)
    onto = peft.PeftModel.from_pretrained(GKAForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    for loaded in (onto, peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")):
        assert torch.equal(logits(loaded.eval(), tokens), logits(model, tokens))


def test_convolutions_train_by_modules_to_save() -> None:
    rank = tiny_model("gka").model.layers[0].gka.q_conv1d.out_channels  # others are refused by PEFT itself
    config = peft.LoraConfig(r=rank, target_modules=["q_conv1d"], task_type="CAUSAL_LM")
    with pytest.raises(TypeError, match="leave it out of target_modules, and train it by modules_to_save"):
        peft.get_peft_model(tiny_model("gka"), config)
    saved = ["q_conv1d", "k_conv1d", "v_conv1d"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM")
    model, tokens = peft.get_peft_model(tiny_model("gka"), config), random_tokens(2, 13)
    model(tokens, labels=tokens).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "conv1d" in n}
    assert len(trained) == 6 and all(p.grad is not None and p.grad.norm() > 0 for p in trained.values())


@pytest.mark.parametrize("kind", ["gka", "hybrid"])
def test_prefix_tuning_is_refused(kind: str) -> None:
    config = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model, tokens = peft.get_peft_model(tiny_model(kind, torch.float32), config), random_tokens(2, 13)
    with pytest.raises(ValueError, match="a recurrent state has no prefix to attend to: use prompt tuning"):
        model(tokens)


@pytest.mark.parametrize("kind", ["gka", "hybrid"])
def test_prompt_tuning_trains_and_generates(kind: str, tmp_path: Path) -> None:
    tiny_model(kind, torch.float32).save_pretrained(tmp_path / "base")
    base = GKAForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model, tokens = peft.get_peft_model(base, config), random_tokens(2, 13)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3)
    losses = losses_of_training(model, tokens, optimizer, steps=15)
    assert losses[-1] < 0.9 * losses[0], losses
    model.eval().save_pretrained(tmp_path / "prompt")
    mask = torch.ones_like(tokens)
    text = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=4, do_sample=False)
    with torch.no_grad():  # the same, without a cache
        for position in range(tokens.shape[1], text.shape[1]):
            assert torch.equal(logits(model, text[:, :position])[:, -1].argmax(-1), text[:, position])
    again = peft.PeftModel.from_pretrained(GKAForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "prompt")
    assert torch.equal(logits(again.eval(), tokens), logits(model, tokens))
