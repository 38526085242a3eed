"""What transformers and PEFT decide by lists of names comes out right for the models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import assert_near, random_tokens, tiny_model
from transformers import Trainer, TrainingArguments
from transformers.models.auto import modeling_auto

from gka import GKAForSequenceClassification

KINDS = ("gka", "hybrid")


def trainer(model: torch.nn.Module, folder: Path, **arguments: Any) -> Trainer:
    return Trainer(model, TrainingArguments(str(folder), use_cpu=True, report_to=[], **arguments))


def labelled() -> dict[str, torch.Tensor]:
    tokens = random_tokens(2, 13)
    labels = tokens.clone()
    labels[1, 9:] = -100
    return {"input_ids": tokens, "labels": labels}


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_label_smoothing_shifts_the_labels(kind: str, lora: bool, tmp_path: Path) -> None:
    """With next to no smoothing the Trainer's loss is the model's own."""
    model: Any = tiny_model(kind, torch.float32)
    if lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    smoothed = trainer(model, tmp_path, label_smoothing_factor=1e-9).compute_loss(model, labelled())
    assert_near(smoothed, model(**labelled()).loss, 1e-5)
    stronger = trainer(model, tmp_path, label_smoothing_factor=0.5).compute_loss(model, labelled())
    assert (stronger - smoothed).abs() > 0.01


def test_label_smoothing_of_a_classifier_shifts_nothing(tmp_path: Path) -> None:
    config = tiny_model().config
    config.num_labels = 3
    model = GKAForSequenceClassification(config)
    batch = {"input_ids": random_tokens(4, 9), "labels": torch.tensor([0, 2, 1, 1])}
    smoothed = trainer(model, tmp_path, label_smoothing_factor=1e-9).compute_loss(model, dict(batch))
    assert_near(smoothed, model(**batch).loss, 1e-5)


def test_the_auto_classes_still_list_their_models() -> None:
    for mapping in (
        modeling_auto.MODEL_MAPPING,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    ):
        config = tiny_model().config
        assert type(config) in mapping and mapping[type(config)].config_class is type(config)


def test_lm_eval_knows_the_kind_of_model(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    monkeypatch.setattr(lm_eval.eval_logger, "propagate", True)
    model = object.__new__(lm_eval.HFLM)
    model._get_backend(tiny_model().config)
    assert model.backend == "causal" and "neither marked" not in caplog.text


ADAPTERS = {
    "LoraConfig": {"q_proj", "v_proj"},
    "AdaLoraConfig": {"q_proj", "v_proj"},
    "VeraConfig": {"q_proj", "v_proj"},
    "IA3Config": {"q_proj", "v_proj", "down_proj"},
    "LNTuningConfig": {"post_attention_layernorm"},
    "LoKrConfig": {"q_proj", "v_proj"},
}


@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_adapters_know_what_to_change(adapter: str) -> None:
    peft = pytest.importorskip("peft")
    needs = {"total_step": 10} if adapter == "AdaLoraConfig" else {}
    config = getattr(peft, adapter)(task_type="CAUSAL_LM", **needs)
    model = peft.get_peft_model(tiny_model("hybrid", num_key_value_heads=4), config)
    assert model.peft_config["default"].target_modules == ADAPTERS[adapter]
    tokens = random_tokens(1, 7)
    model(tokens, labels=tokens).loss.backward()
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert any("layers.0.gka" in n or "layers.0.post" in n for n in trained)
    assert any("layers.1.self_attn" in n or "layers.1.post" in n for n in trained)


def test_peft_is_not_imported_and_may_come_later() -> None:
    pytest.importorskip("peft")
    code = """
import sys, gka.hf
assert "peft" not in sys.modules
import peft
assert not any(getattr(finder, "name", "").startswith("peft") for finder in sys.meta_path)
print(peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["gka"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout == "['q_proj', 'v_proj']\n", done.stderr
