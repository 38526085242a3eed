"""States in bfloat16: half the memory where decays allow it; a warning or an error where they do not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import engine, engine_model, generated, next_logprobs, random_prompts

from gka import GKAForCausalLM

PROMPTS = random_prompts(2, 40, 150)


@pytest.fixture(autouse=True)
def any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs that compute in bfloat16 vLLM keeps states of all models but one kind in float32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


def decaying(folder: Path, A_log: float, dt_bias: float) -> GKAForCausalLM:
    """A model in the folder whose heads all decay alike."""
    model = engine_model("pure", folder)
    for block in model.model.layers:
        block.gka.set_decay("A_log", torch.full((4,), A_log))
        block.gka.set_decay("dt_bias", torch.full((4,), dt_bias))
    model.save_pretrained(folder)
    return model


def heard(llm_options: dict[str, Any], folder: Path, caplog: pytest.LogCaptureFixture) -> tuple[list[Any], str]:
    """What is generated, and the warnings about decays."""
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    try:
        with engine(folder, **llm_options) as llm:
            states = [layer.kv_cache[0].dtype for layer in layers_of(llm)]
            assert states == [torch.bfloat16] * len(states)
            outputs = generated(llm, PROMPTS)
    finally:
        logger.removeHandler(caplog.handler)
    return outputs, "\n".join(text for text in caplog.messages if "decay" in text)


def layers_of(llm: Any) -> list[Any]:
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return [layer for name, layer in context.items() if name.endswith(".gka")]


def test_strong_decays_keep_what_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = decaying(tmp_path, 0.4, 0.4)  # about -1.3
    outputs, warnings = heard(dict(mamba_ssm_cache_dtype="bfloat16"), tmp_path, caplog)
    assert not warnings
    differences = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        logprobs = next_logprobs(model, list(output.prompt_token_ids) + tokens[:-1])[-len(tokens) :]
        for step, token, expected in zip(output.outputs[0].logprobs, tokens, logprobs, strict=True):
            differences.append(abs(step[token].logprob - float(expected[token])))
    middle = sorted(differences)[len(differences) // 2]
    assert 1e-4 < middle < 0.1, differences


def test_weak_decays_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    decaying(tmp_path, -3.0, -3.0)  # about -0.0024
    _, warnings = heard(dict(mamba_ssm_cache_dtype="bfloat16"), tmp_path, caplog)
    assert "8 of 8 heads decay by less than 0.01 per token" in warnings


def test_no_decay_is_refused(tmp_path: Path) -> None:
    engine_model("no gates", tmp_path)
    with pytest.raises(ValueError, match="mamba_ssm_cache_dtype is 'bfloat16'; expected float32 for a model"):
        with engine(tmp_path, mamba_ssm_cache_dtype="bfloat16"):
            pass
