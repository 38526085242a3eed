"""TRL's SFTTrainer: packed and padding-free batches train as padded ones do, without flash attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import FULL, GKA, SLIDING, assert_near

from gka import GKAConfig, GKAForCausalLM
from gka.training.data import load_tokenizer

Dataset = pytest.importorskip("datasets").Dataset
LoraConfig = pytest.importorskip("peft").LoraConfig
trl = pytest.importorskip("trl")

TEXTS = ("a gain of one half", "key", "the state of the past, which fades", "x = 1", "values and keys", "decay")
LAYERS = {"gka": [GKA, GKA], "hybrid": [GKA, FULL], "hybrid, sliding": [SLIDING, GKA]}
WAYS: dict[str, dict[str, Any]] = {
    "padded": dict(per_device_train_batch_size=6),
    "padding-free": dict(per_device_train_batch_size=6, padding_free=True, max_length=None),
    "padding-free, rounded up": dict(
        per_device_train_batch_size=6, padding_free=True, max_length=None, pad_to_multiple_of=16
    ),
    "packed": dict(per_device_train_batch_size=3, packing=True, max_length=36),
    "packed, longer texts split": dict(
        per_device_train_batch_size=3, packing=True, packing_strategy="bfd_split", max_length=36
    ),
}


def trainer(kind: str, way: str, folder: Path, peft_config: LoraConfig | None = None) -> trl.SFTTrainer:
    """A trainer whose every batch is all texts."""
    torch.manual_seed(0)
    config = GKAConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=LAYERS[kind],
        sliding_window=5,
        initializer_range=0.2,
        solver_steps=[8],
    )
    options = dict(
        output_dir=str(folder),
        max_steps=4,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    return trl.SFTTrainer(
        model=GKAForCausalLM(config),
        args=trl.SFTConfig(**options, **WAYS[way]),
        train_dataset=Dataset.from_dict({"text": list(TEXTS)}),
        processing_class=load_tokenizer(None),
        peft_config=peft_config,
    )


def losses_and_weights(run: trl.SFTTrainer) -> tuple[torch.Tensor, torch.Tensor]:
    run.train()
    losses = [logs["loss"] for logs in run.state.log_history if "loss" in logs]
    weights = [value.detach().flatten() for value in run.model.parameters()]
    return torch.tensor(losses), torch.cat(weights)


@pytest.mark.parametrize("kind", list(LAYERS))
def test_packed_training_equals_padded_training(kind: str, tmp_path: Path) -> None:
    """Four steps of AdamW: the later losses and the weights depend on the gradients of the earlier ones."""
    losses, weights = losses_and_weights(trainer(kind, "padded", tmp_path))
    assert len(losses) == 4 and losses[3] < losses[0] - 0.5
    for way in list(WAYS)[1:]:
        got_losses, got_weights = losses_and_weights(trainer(kind, way, tmp_path))
        assert_near(got_losses, losses, 1e-5, f"losses, {way}")
        assert_near(got_weights, weights, 1e-5, f"weights, {way}")


def test_packed_training_of_an_adapter(tmp_path: Path) -> None:
    runs = {}
    for way in ("padded", "padding-free", "packed"):
        run = trainer("hybrid", way, tmp_path, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        frozen = run.model.get_base_model().model.embed_tokens.weight.clone()
        runs[way] = losses_and_weights(run)
        assert torch.equal(run.model.get_base_model().model.embed_tokens.weight, frozen)
    for losses, weights in (runs["padding-free"], runs["packed"]):
        assert_near(losses, runs["padded"][0], 1e-5, "losses")
        assert_near(weights, runs["padded"][1], 1e-5, "weights")


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_what_a_packed_batch_tells(kind: str, way: str, tmp_path: Path) -> None:
    """One row, where its sequences start and no mask; without the starts the loss would be another."""
    run = trainer(kind, way, tmp_path)
    assert run.model.config._attn_implementation == "sdpa"
    batch = dict(next(iter(run.get_train_dataloader())))
    pads = int((batch["input_ids"] == 0).sum())
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
    assert len(batch["cu_seq_lens_q"]) - 1 == int((batch["position_ids"] == 0).sum()) == len(TEXTS) + pads
    told = {name: batch.pop(name) for name in list(batch) if name not in ("input_ids", "labels")}
    loss, joined = (run.model(**batch, **more).loss for more in (told, {}))
    assert abs(joined.item() - loss.item()) > 1e-3
    for name in ("position_ids", "cu_seq_lens_q", "seq_idx"):
        assert_near(run.model(**batch, **{name: told[name]}).loss, loss, 1e-6, name)


def test_a_model_by_its_folder(tmp_path: Path) -> None:
    run = trainer("hybrid", "packed", tmp_path)
    run.save_model(str(tmp_path / "model"))
    assert "auto_map" not in json.loads((tmp_path / "model" / "config.json").read_text())
    again = trl.SFTTrainer(model=str(tmp_path / "model"), args=run.args, train_dataset=run.train_dataset)
    assert type(again.model) is GKAForCausalLM
    for ours, theirs in zip(again.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
