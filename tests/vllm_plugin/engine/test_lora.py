"""LoRA adapters of GKA layers, softmax attention and feed-forward: some requests with one, others without."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from engine_helpers import assert_equal, engine, engine_model, generated, random_prompts
from safetensors.torch import save_file

from gka import GKAForCausalLM

RANK, ALPHA = 4, 8
TARGETS = tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "g", "gate", "up", "down"))


def adapted(model: GKAForCausalLM, folder: Path, seed: int, targets: tuple[str, ...] = TARGETS) -> GKAForCausalLM:
    """Write a random adapter as PEFT does; the model with the adapter in its weights."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    whole, tensors = copy.deepcopy(model), {}
    for name, module in whole.named_modules():
        if name.rsplit(".", 1)[-1] in targets:
            A = torch.randn(RANK, module.in_features, generator=generator) * 0.1
            B = torch.randn(module.out_features, RANK, generator=generator) * 0.1
            module.weight.data += ALPHA / RANK * B @ A
            tensors |= {f"base_model.model.{name}.lora_{part}.weight": x for part, x in (("A", A), ("B", B))}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, bias="none", use_dora=False)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": list(targets)}))
    return whole


def test_requests_with_and_without_adapters(tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    model = engine_model("hybrid", tmp_path / "model")
    first, second = (adapted(model, tmp_path / str(n), n) for n in (1, 2))
    prompts = random_prompts(3, 20, 90, 9)
    adapters = [LoRARequest("1", 1, str(tmp_path / "1")), None, LoRARequest("2", 2, str(tmp_path / "2")), None]
    # Three places: on the CPU, vLLM's products take the last place for requests without an adapter.
    with engine(tmp_path / "model", enable_lora=True, max_loras=3, max_lora_rank=8) as llm:
        outputs = generated(llm, prompts, lora_request=adapters)
        adapted(model, tmp_path / "3", 3, ("q_proj", "b_proj"))
        with pytest.raises(ValueError, match="b_proj"):
            generated(llm, prompts[:1], lora_request=LoRARequest("3", 3, str(tmp_path / "3")))
    for whole, output in zip((first, model, second, model), outputs, strict=True):
        assert_equal(whole, [output])
