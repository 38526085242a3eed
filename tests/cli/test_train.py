"""`gka train`: what a run leaves behind, and that nothing changes its losses."""

from __future__ import annotations

import json
import math
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import data_loader
from forked import run_forked, run_ranks
from pages import assert_drawn
from tiny_run import SETTINGS, command, logged, run_process, train, write_texts
from transformers import AutoTokenizer, TrainingArguments

from gka.cli import main as cli
from gka.cli.commands import TrainOptions
from gka.cli.loading import load_checkpoint
from gka.cli.plots import plot_loss
from gka.cli.train import _large_share, model_config
from gka.hf import model as model_module
from gka.hf.loss import chunked_loss
from gka.hf.model import GKAForCausalLM
from gka.training.data import Manifest, load_tokenizer
from gka.training.learning_rate import Schedule
from gka.training.trainer import GKATrainer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `texts/` and a finished run of them in `run/`."""
    folder = tmp_path_factory.mktemp("train")
    assert train(folder / "run", write_texts(folder / "texts")) == 0
    return folder


def metrics(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


# What a run leaves behind


def test_a_run_leaves_what_it_promises(place: Path) -> None:
    left = {path.name for path in (place / "run").iterdir()}
    assert left == {
        "checkpoint-8", "checkpoint-12", "data", "loss.png", "metrics.json", "model", "options.yaml",
        "tensorboard", "trainer_state.json",
    }  # fmt: skip
    assert_drawn(place / "run" / "loss.png")
    assert list((place / "run" / "tensorboard").iterdir())
    assert not list((place / "run" / "model").glob("*.bin"))


def test_metrics_name_machine_versions_and_command(place: Path) -> None:
    found = metrics(place / "run")
    assert found["steps"] == 12
    assert found["tokens"] == 12 * 4 * 32
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["cores"] >= 1
    assert found["command"]
    assert found["options"]["hidden_size"] == 16
    validation = found["validation"]
    bits = validation["nats"] / math.log(2) / validation["bytes"]
    assert validation["bits_per_byte"] == pytest.approx(bits)
    assert 0 < validation["bytes"] <= SETTINGS["eval_bytes"]


def test_every_step_is_logged_and_the_model_learns(place: Path) -> None:
    losses = logged(place / "run")
    assert list(losses) == list(range(1, 13))
    assert losses[1] == pytest.approx(math.log(259) + 0.5, abs=0.3)  # first logits have variance 1
    assert losses[12] < losses[1] - 0.1
    rates = logged(place / "run", "learning_rate")
    assert rates[1] == 0.0
    assert max(rates.values()) > 0.9e-3
    assert rates[12] < 0.1e-3


def test_validation_bits_per_byte_are_those_of_the_loss(place: Path) -> None:
    losses = logged(place / "run", "eval_loss")
    bits = logged(place / "run", "eval_bits_per_byte")
    assert list(bits) == [6, 12]
    tokens_per_byte = Manifest.load(place / "run" / "data").tokens_per_byte
    for step, loss in losses.items():
        assert bits[step] == pytest.approx(loss / math.log(2) * tokens_per_byte)


def test_the_saved_options_describe_the_run(place: Path) -> None:
    saved = yaml.safe_load((place / "run" / "options.yaml").read_text())
    assert saved["hidden_size"] == 16
    assert saved["data"] == [str(place / "texts")]
    assert saved["resume"] is saved["overwrite"] is False


def test_the_checkpoint_loads_with_the_auto_classes_in_a_new_process(place: Path) -> None:
    script = (
        "import sys, torch, gka\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer('state λ', return_tensors='pt', add_special_tokens=False)['input_ids']\n"
        "print(type(model).__name__, float(model(ids).logits.double().sum()))\n"
    )
    path = str(place / "run" / "model")
    name, total = run_process(script, path, launcher=("-c",)).stdout.split()
    model, _ = load_checkpoint(path, "cpu")
    ids = AutoTokenizer.from_pretrained(path)("state λ", return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        expected = float(model(ids["input_ids"]).logits.double().sum())
    assert name == "GKAForCausalLM"
    assert float(total) == pytest.approx(expected, rel=1e-5)


# Interrupted and resumed


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("target", "call", "newest"),
    [
        pytest.param("gka.training.data:encode", 3, None, id="while-tokens-are-written"),
        pytest.param("torch:save", 6, "checkpoint-4", id="in-the-middle-of-a-checkpoint"),
        pytest.param("gka.hf.folders:to_disk", 3, "checkpoint-4", id="before-a-checkpoint-is-renamed"),
        pytest.param(
            "gka.training.trainer:ScheduleCallback.on_step_end", 11, "checkpoint-8", id="between-checkpoints"
        ),
        pytest.param("gka.cli.train:plot_loss", 1, "checkpoint-12", id="after-training"),
    ],
)
def test_killed_and_resumed_gives_the_same_losses(
    place: Path, tmp_path: Path, target: str, call: int, newest: str | None
) -> None:
    # 12 steps of 4 sequences are more than one pass over the texts, so the data order of a second
    # pass is resumed too.
    arguments = command("train", output=tmp_path / "run", data=[place / "texts"], **SETTINGS)
    killed = run_forked("-m", "kill_at", target, str(call), *arguments, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    assert (checkpoints[-1].name if checkpoints else None) == newest
    assert not (tmp_path / "run" / "metrics.json").exists()

    assert cli.main(command("train", output=tmp_path / "run", resume=True)) == 0
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        assert logged(tmp_path / "run", key) == logged(place / "run", key), "bit for bit"
    mine, theirs = metrics(tmp_path / "run"), metrics(place / "run")
    assert mine["validation"] == theirs["validation"]
    assert not list((tmp_path / "run").glob("*.partial"))


def test_a_finished_run_that_is_resumed_trains_no_further(place: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", place / "texts", max_steps=4) == 0
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "metrics.json").unlink()
    assert cli.main(command("train", output=tmp_path / "run", resume=True)) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before
    assert metrics(tmp_path / "run")["steps"] == 4
    assert list(logged(tmp_path / "run")) == [1, 2, 3, 4]


def test_a_time_budget_ends_the_run_and_is_resumed(place: Path, tmp_path: Path) -> None:
    options = {**SETTINGS, "max_minutes": 1.5 / 60, "save_every": 10, "eval_every": 1000}
    del options["max_steps"]
    assert cli.main(command("train", output=tmp_path / "run", data=[place / "texts"], **options)) == 0
    first = metrics(tmp_path / "run")
    rates = logged(tmp_path / "run", "learning_rate")
    assert 1.4 <= first["seconds"] < 6
    assert rates[max(rates)] < 0.2 * max(rates.values()), "the learning rate has come down"
    resumed = command("train", output=tmp_path / "run", resume=True, max_minutes=2.5 / 60)
    assert cli.main(resumed) == 0
    second = metrics(tmp_path / "run")
    assert second["steps"] > first["steps"]
    assert first["seconds"] < second["seconds"] < first["seconds"] + 6
    assert list(logged(tmp_path / "run")) == list(range(1, second["steps"] + 1))


# Several processes


def test_two_processes_give_the_losses_of_one_with_the_double_batch(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command("train", output=tmp_path / "run", data=[place / "texts"],
                        **{**SETTINGS, "batch_size": 2, "max_steps": 6})  # fmt: skip
    done = run_ranks("-m", "gka", *arguments)
    assert train(tmp_path / "one", place / "texts", max_steps=6) == 0
    two, one = logged(tmp_path / "run"), logged(tmp_path / "one")
    assert list(two) == list(one)
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=1e-4)
    bits = [metrics(tmp_path / name)["validation"]["bits_per_byte"] for name in ("run", "one")]
    assert bits[0] == pytest.approx(bits[1], rel=1e-3)
    assert done.stdout.count("bits per byte") == 1, "one process reports"
    told = re.findall(r"validation (\d+\.\d+) bits/byte", done.stderr)
    assert told == [f"{bits:.3f}" for bits in logged(tmp_path / "run", "eval_bits_per_byte").values()] and told
    capsys.readouterr()
    assert cli.main(command("train", output=tmp_path / "run", resume=True)) == 2
    assert "has 4 sequences, now 2; with another number of processes change" in capsys.readouterr().err


# Options reach the model and the optimiser


def test_model_options_reach_the_configuration() -> None:
    options = TrainOptions(
        hidden_size=96, layers=3, heads=6, kv_heads=2, head_dim=8, mixer="gla", attention_layers=[1],
        ridge_ratio=0.05, tie_embeddings=True,
    )  # fmt: skip
    config = model_config(options, load_tokenizer(None))
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (96, 3, 256)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 2, 8)
    assert config.layer_types == ["linear_attention", "full_attention", "linear_attention"]
    assert (config.mixer, config.ridge_ratio) == ("gla", 0.05)
    assert model_config(TrainOptions(solver_steps=[8, 8]), load_tokenizer(None)).solver_steps == [8, 8]
    assert (config.vocab_size, config.eos_token_id, config.tie_word_embeddings) == (259, 1, True)


def test_weight_decay_is_for_matrices_only(place: Path, tmp_path: Path) -> None:
    model, _ = load_checkpoint(str(place / "run"), "cpu")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = GKATrainer(schedule=Schedule(1, None, 0.0), tokens_per_byte=1.0, model=model, args=arguments)
    decayed = set(trainer.get_decay_parameter_names(model))
    everything = dict(model.named_parameters())
    spared = {name for name in everything if name not in decayed}
    assert {name.rsplit(".", 1)[-1] for name in spared} >= {"A_log", "dt_bias", "bias"}
    assert all(everything[name].ndim == 1 for name in spared)
    assert all(everything[name].ndim >= 2 for name in decayed)


@pytest.mark.parametrize(
    "changed",
    [
        {"gradient_checkpointing": True},
        {"batch_size": 2, "accumulation": 2},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_how_it_is_computed_does_not_change_the_losses(
    place: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    assert train(tmp_path / "run", place / "texts", **changed) == 0
    expected = logged(place / "run")
    for step, loss in logged(tmp_path / "run").items():
        assert loss == pytest.approx(expected[step], rel=1e-5)


def test_the_loss_in_chunks(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and validation, with the same losses; another size may be given to resume."""
    chunks = []

    def watched(head: Any, hidden: torch.Tensor, labels: torch.Tensor, chunk: int, **told: Any) -> torch.Tensor:
        chunks.append((hidden.shape[0], chunk))
        return chunked_loss(head, hidden, labels, chunk, **told)

    monkeypatch.setattr(model_module, "chunked_loss", watched)
    assert train(tmp_path / "run", place / "texts", loss_chunk=20, max_steps=6) == 0
    assert chunks[:6] == [(4, 20)] * 6 and len(chunks) > 6
    expected = logged(place / "run")
    assert logged(tmp_path / "run")[1] == pytest.approx(expected[1], rel=1e-5)
    assert logged(tmp_path / "run", "eval_loss")[6] == pytest.approx(math.log(259), abs=0.5)
    assert cli.main(command("train", output=tmp_path / "run", resume=True, max_steps=7, loss_chunk=9)) == 0
    assert chunks[-1][1] == 9


def test_a_batch_is_copied_without_waiting(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that waits makes the host wait for all earlier steps of a GPU."""
    seen, send = [], data_loader.send_to_device
    monkeypatch.setattr(
        data_loader,
        "send_to_device",
        lambda *args, **told: seen.append(told["non_blocking"]) or send(*args, **told),
    )
    assert train(tmp_path / "run", place / "texts", max_steps=2) == 0
    assert len(seen) >= 2 and all(seen)


def test_the_loss_of_a_qwen3_has_no_chunks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command("train", output=tmp_path / "run", family="qwen3", loss_chunk=20)) == 2
    assert "--loss-chunk needs --family gka; --family qwen3" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changed",
    [{"dtype": "bfloat16"}, {"mixer": "gla"}, {"attention_layers": "1"}],
    ids=lambda changed: next(iter(changed)),
)
def test_other_models_train_too(place: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    settings = {**SETTINGS, **changed, "learning_rate": 1e-2}
    if changed.get("mixer") == "gla":
        del settings["solver_steps"]  # there is nothing to solve
    assert cli.main(command("train", output=tmp_path / "run", data=[place / "texts"], **settings)) == 0
    losses = logged(tmp_path / "run")
    assert losses[12] < losses[1] - 0.1
    assert losses != logged(place / "run")


def test_the_seed_decides_the_run(place: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "same", place / "texts", max_steps=4) == 0
    assert train(tmp_path / "other", place / "texts", max_steps=4, seed=1) == 0
    first = {step: loss for step, loss in logged(place / "run").items() if step == 1}
    assert {1: logged(tmp_path / "same")[1]} == first
    assert {1: logged(tmp_path / "other")[1]} != first


def test_overwrite_starts_anew(place: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", place / "texts", max_steps=8) == 0
    assert train(tmp_path / "run", place / "texts", max_steps=4, hidden_size=8, overwrite=True) == 0
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4"]
    assert GKAForCausalLM.from_pretrained(tmp_path / "run" / "model").config.hidden_size == 8
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_a_loss_that_explodes_ends_the_run_in_one_line(
    place: Path, tmp_path: Path, rate: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", place / "texts", learning_rate=rate, warmup=0) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("gka train: error: the training has diverged at step ")
    assert "--learning-rate" in error
    assert not (tmp_path / "run" / "model").exists()


# The picture


@pytest.mark.parametrize("steps", [0, 1, 300])
def test_the_picture_is_drawn_for_any_length(tmp_path: Path, steps: int) -> None:
    train_curve = [(step, 8 / (1 + step)) for step in range(steps)]
    plot_loss(tmp_path / "loss.png", train_curve, train_curve[::50], "title")
    size = (tmp_path / "loss.png").stat().st_size
    assert size > 5_000


def test_a_share_held_out_far_above_the_fraction_is_told() -> None:
    assert _large_share(0.08, 0.05) == _large_share(0.42, 0.2) == ""
    assert _large_share(0.79, 0.05).startswith(
        ", 79% of the text for --validation-fraction 0.05, since whole files"
    )
