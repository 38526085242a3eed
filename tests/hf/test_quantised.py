"""Models with weights of 4 bits (bitsandbytes, nf4): the gates stay as they are, and QLoRA trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_error
from model_helpers import losses_of_training, random_tokens, tiny_model
from torch import nn
from transformers import BitsAndBytesConfig

from gka import GKAForCausalLM
from gka.nn.decay import UNDECAYED, with_rests

peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

GATES = {"a_proj", "b_proj", "alpha_proj"}
# On a CPU, kernels of bitsandbytes take widths that 32 divides, and rows that 64 divides.
WIDE = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wide")
    tiny_model("hybrid", torch.float32, **WIDE).save_pretrained(place)
    return place


def quantised(source: Path, **options: Any) -> GKAForCausalLM:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, **options
    )
    model: GKAForCausalLM = GKAForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype=torch.bfloat16
    )
    return model


def kinds(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if type(module) is kind}


@pytest.mark.parametrize("options", [{}, {"llm_int8_skip_modules": ["lm_head"]}])
@torch.no_grad()
def test_the_gates_are_not_quantised(folder: Path, options: dict[str, Any]) -> None:
    model, tokens = quantised(folder, **options), random_tokens(2, 20)
    assert kinds(model, nn.Linear) == {*GATES, "lm_head"}
    assert kinds(model, bitsandbytes.nn.Linear4bit) >= {
        "q_proj",
        "k_proj",
        "v_proj",
        "g_proj",
        "o_proj",
        "up_proj",
    }
    assert model(tokens).logits.isfinite().all()
    assert {value.dtype for name, value in model.named_parameters() if name.endswith(UNDECAYED)} == {
        torch.bfloat16
    }


@torch.no_grad()
def test_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    model, tokens = quantised(folder), random_tokens(2, 20)
    model.save_pretrained(tmp_path)
    loaded = GKAForCausalLM.from_pretrained(tmp_path)
    first = GKAForCausalLM.from_pretrained(folder).state_dict()
    for found in (model, loaded):
        for name, value in with_rests(found.state_dict(), found).items():
            assert not name.endswith(UNDECAYED) or torch.equal(value, first[name]), name
    assert relative_error(loaded(tokens).logits.float(), model(tokens).logits.float()) < 1e-6


def test_qlora_trains(folder: Path) -> None:
    base, tokens = quantised(folder), random_tokens(2, 20)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = losses_of_training(model, tokens, optimizer, steps=8)
    assert losses[-1] < 0.9 * losses[0], losses
    moved = {n.split(".")[-4] for n, p in model.named_parameters() if "lora_B" in n and p.abs().max() > 1e-4}
    assert moved >= {*GATES, "q_proj", "down_proj"}


@torch.no_grad()
def test_in_float16_the_gates_are_float16(folder: Path) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)
    model = GKAForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float16)
    assert {value.dtype for value in model.parameters()} == {torch.float16, torch.uint8}
    assert model(random_tokens(2, 20)).logits.dtype == torch.float16
