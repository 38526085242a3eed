"""`python -m experiments mqar`: trainings, results files, resuming and the table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pages import assert_drawn
from transformers import DynamicCache

from experiments import __main__ as command_line
from experiments.tasks import mqar_train
from experiments.tasks.mqar import IGNORE, make_mqar
from experiments.tasks.mqar_options import ALL_MIXERS, MIXERS, Cell, MQAROptions, cells
from experiments.tasks.mqar_report import format_table, summarise
from experiments.tasks.mqar_run import main
from experiments.tasks.mqar_train import answers, model_config, state_size, steps_of, train_cell
from gka import GKAForCausalLM
from gka.training.errors import UserError


def tiny(**changes: Any) -> MQAROptions:
    """Two pairs in eight tokens, 16 tokens in all: learned in seconds."""
    settings: dict[str, Any] = {
        "seq_len": 8,
        "num_pairs": 2,
        "vocab_size": 16,
        "train_examples": 320,
        "test_examples": 50,
        "dims": [16],
        "heads": 1,
        "epochs": 2,
        "batch_size": 32,
        "learning_rates": [1e-2],
        "eval_every": 8,
        "device": "cpu",
    }
    return MQAROptions(**{**settings, **changes})


def silent(step: int, accuracy: float | None) -> None:
    """A report that goes nowhere."""


# One training


def test_a_training_learns_the_task() -> None:
    options = tiny(epochs=20, train_examples=640, vocab_size=12, dims=[32], eval_every=25, stop_accuracy=0.9)
    entry = train_cell(options, Cell("gla", 32, 1e-2, 0), silent)
    assert entry["accuracy"] > 0.9
    assert entry["steps"] < steps_of(options), "it ends once the accuracy is reached"
    assert entry["history"][-1] == [entry["steps"], entry["accuracy"], entry["loss"]]


@pytest.mark.parametrize("mixer", ALL_MIXERS)
def test_a_training_is_reproducible(mixer: str) -> None:
    def train(seed: int) -> list[list[float]]:
        options = tiny(train_examples=96, eval_every=4)
        return train_cell(options, Cell(mixer, 16, 1e-2, seed), silent)["history"]

    assert train(0) == train(0) != train(1)


def test_tests_are_where_they_should_be_and_at_the_end() -> None:
    seen: list[tuple[int, float | None]] = []
    options = tiny(train_examples=330)
    entry = train_cell(options, Cell("gla", 16, 1e-2, 0), lambda step, accuracy: seen.append((step, accuracy)))
    assert steps_of(options) == entry["steps"] == 22
    assert [step for step, _, _ in entry["history"]] == [8, 16, 22]
    assert [step for step, _ in seen] == list(range(1, 23))
    assert seen[7][1] is None and seen[8][1] == entry["history"][0][1]


@pytest.mark.parametrize("mixer", ALL_MIXERS)
def test_a_training_whose_loss_is_lost_ends_and_says_so(mixer: str) -> None:
    entry = train_cell(tiny(), Cell(mixer, 16, 1e30, 0), silent)
    assert (entry["accuracy"], entry["loss"]) == (0.0, None)
    assert entry["history"] == [[entry["steps"], 0.0, None]] and entry["steps"] < steps_of(tiny())
    json.dumps(entry, allow_nan=False)


@pytest.mark.parametrize("mixer", MIXERS)
def test_accuracy_and_loss_are_those_of_all_logits(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[GKAForCausalLM] = []

    class Kept(GKAForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            made.append(self)

    monkeypatch.setattr(mqar_train, "GKAForCausalLM", Kept)
    entry = train_cell(tiny(test_examples=64), Cell(mixer, 16, 1e-2, 3), silent)
    inputs, labels = make_mqar(64, seq_len=8, num_pairs=2, vocab_size=16, seed=3, split="test")
    with torch.no_grad():
        logits = made[0].eval()(inputs).logits
    right = (logits.argmax(-1) == labels)[labels != IGNORE].double().mean().item()
    loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE).item()
    assert entry["accuracy"] == pytest.approx(right, abs=1e-5)
    assert entry["loss"] == pytest.approx(loss, rel=1e-4)


def test_logits_at_the_queries_are_the_models_own() -> None:
    torch.manual_seed(0)
    model = GKAForCausalLM(model_config(tiny(), "gka", 16))
    inputs, labels = make_mqar(5, seq_len=8, num_pairs=2, vocab_size=16)
    torch.testing.assert_close(answers(model, inputs, labels != IGNORE), model(inputs).logits[labels != IGNORE])


@pytest.mark.parametrize("mixer", ALL_MIXERS)
def test_state_size_is_what_the_cache_holds_for_a_sequence(mixer: str) -> None:
    config = model_config(tiny(heads=2, head_dim=6), mixer, 12)
    cache = DynamicCache(config=config)
    GKAForCausalLM(config)(torch.zeros(1, 11, dtype=torch.int64), past_key_values=cache, use_cache=True)
    layer: Any = cache.layers[0]
    held = (layer.keys, layer.values) if mixer == "attention" else layer.recurrent_states.values()
    assert state_size(config, 11) == sum(state.numel() for state in held if state is not None)


def test_mixers_differ_in_the_mixer_alone() -> None:
    shapes = {}
    for mixer in MIXERS:
        model = GKAForCausalLM(model_config(tiny(), mixer, 16))
        shapes[mixer] = {name: tuple(value.shape) for name, value in model.named_parameters()}
    outside = [
        {name: shape for name, shape in of.items() if ".gka." not in name and ".self_attn." not in name}
        for of in shapes.values()
    ]
    assert outside[0] == outside[1] == outside[2]
    solve = {name for name in shapes["gka"] if name not in shapes["gla"]}
    assert solve and all("alpha_proj" in name for name in solve) and shapes["gla"].keys() <= shapes["gka"].keys()


def test_undecayed_parameters_are_left_to_themselves() -> None:
    model = GKAForCausalLM(model_config(tiny(), "gka", 16))
    trainer = object.__new__(mqar_train.RecallTrainer)
    decayed = set(trainer.get_decay_parameter_names(model))
    assert "model.layers.0.gka.q_proj.weight" in decayed
    assert not any(name.endswith(("A_log", "dt_bias", "bias", "norm.weight")) for name in decayed)


# The comparison


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Trainings that take no time; the list of those asked for."""
    asked: list[Cell] = []

    def train(options: MQAROptions, cell: Cell, report: Any) -> dict[str, Any]:
        asked.append(cell)
        accuracy = 0.5 + 0.1 * cell.seed
        report(1, accuracy)
        return {
            **dataclasses.asdict(cell),
            "accuracy": accuracy,
            "loss": 1.0,
            "steps": 3,
            "parameters": 9,
            "state_size": 4,
            "seconds": 0.0,
            "cpu_seconds": 0.0,
            "history": [[3, accuracy, 1.0]],
            "config": {},
        }

    monkeypatch.setattr(mqar_train, "train_cell", train)
    return asked


def test_results_hold_every_cell_and_what_made_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"train_examples": 96, "epochs": 1, "dims": [8, 16], "mixers": list(ALL_MIXERS)}
    options = tiny(**small, output=str(tmp_path / "new" / "folder"))
    assert main(options) == 0
    results = json.loads((tmp_path / "new" / "folder" / "mqar.json").read_text())
    assert [_axes(entry) for entry in results["cells"]] == [dataclasses.astuple(cell) for cell in cells(options)]
    assert len(results["cells"]) == 10 == len(results["table"])
    (run,) = results["runs"]
    assert run["options"] == dataclasses.asdict(options)
    assert run["versions"]["torch"] and run["machine"]["processor"] and run["command"]
    assert run["seconds"] > 0 and run["cpu_seconds"] > 0
    assert_drawn(tmp_path / "new" / "folder" / "mqar.png")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["mqar.json", "mqar.png"]
    printed = capsys.readouterr().out
    for mixer in ALL_MIXERS:
        assert printed.count(f"\n{mixer} ") == 2
    assert "2 pairs in 8 tokens, vocabulary 16" in printed


def test_threads_are_set_for_the_trainings(tmp_path: Path, quick: list[Cell]) -> None:
    before = torch.get_num_threads()
    try:
        main(tiny(threads=before + 1, output=str(tmp_path)))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_resume_trains_only_what_is_missing(tmp_path: Path, quick: list[Cell]) -> None:
    main(tiny(output=str(tmp_path)))
    first = json.loads((tmp_path / "mqar.json").read_text())
    quick.clear()
    main(tiny(output=str(tmp_path), resume=True))
    assert quick == [] and json.loads((tmp_path / "mqar.json").read_text()) == first
    main(tiny(output=str(tmp_path), resume=True, seeds=[0, 2], mixers=["gka"]))
    assert quick == [Cell("gka", 16, 1e-2, 2)]
    results = json.loads((tmp_path / "mqar.json").read_text())
    assert results["cells"][:3] == first["cells"] and results["cells"][3]["run"] == 1
    row = next(row for row in results["table"] if row["mixer"] == "gka")
    assert (row["seeds"], row["lowest"], row["accuracy"], row["highest"]) == (2, 0.5, 0.6, 0.7)


def test_an_interrupted_run_keeps_what_is_done(
    tmp_path: Path, quick: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = mqar_train.train_cell

    def interrupted(options: MQAROptions, cell: Cell, report: Any) -> dict[str, Any]:
        if cell.mixer == "attention":
            raise KeyboardInterrupt
        return train(options, cell, report)

    monkeypatch.setattr(mqar_train, "train_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(tiny(output=str(tmp_path)))
    assert len(json.loads((tmp_path / "mqar.json").read_text())["cells"]) == 2
    monkeypatch.setattr(mqar_train, "train_cell", train)
    quick.clear()
    main(tiny(output=str(tmp_path), resume=True))
    assert [cell.mixer for cell in quick] == ["attention"]


def test_results_are_not_overwritten_unasked(tmp_path: Path, quick: list[Cell]) -> None:
    main(tiny(output=str(tmp_path)))
    with pytest.raises(UserError, match="--resume adds to them, --overwrite deletes them"):
        main(tiny(output=str(tmp_path)))
    with pytest.raises(UserError, match="have --num-pairs 2, not 1"):
        main(tiny(output=str(tmp_path), resume=True, num_pairs=1))
    quick.clear()
    main(tiny(output=str(tmp_path), overwrite=True, num_pairs=1))
    assert len(quick) == 3 == len(json.loads((tmp_path / "mqar.json").read_text())["cells"])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"runs": [], "cells": []}', '{"runs": [{"options": {}}], "cells": [1]}']
)
def test_a_file_that_is_no_results_file_is_not_resumed(tmp_path: Path, text: str) -> None:
    (tmp_path / "mqar.json").write_text(text)
    with pytest.raises(UserError, match="contains no results of mqar"):
        main(tiny(output=str(tmp_path), resume=True))
    assert (tmp_path / "mqar.json").read_text() == text


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*: cannot write there"):
        main(tiny(output=str(tmp_path / "file")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixers": ["gka", "mamba"]}, "'mamba' is not one of gka, gla, attention"),
        ({"mixers": []}, "--mixers: at least one"),
        ({"seeds": [1, 1]}, "--seeds: 1, 1 contains a value twice"),
        ({"dims": [15], "heads": 2}, "hidden_size is 15; expected a multiple of .* 2"),
        ({"dims": [10], "heads": 2}, "head_dim is 5; expected an even number"),
        ({"seq_len": 7}, "even"),
        ({"num_pairs": 3}, "at least 12"),
        ({"resume": True, "overwrite": True}, "contradict"),
        ({"dims": [600], "mixers": ["gka"]}, "head_dim is 600"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = tmp_path / "out"
    with pytest.raises(UserError, match=message):
        main(tiny(output=str(folder), **changes))
    assert not folder.exists()


def test_the_command_line_ends_with_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["mqar", "--mixers", "gka", "rwkv"]) == 2
    error = capsys.readouterr().err
    assert "--mixers" in error and "rwkv" in error and error.count("\n") == 1


def test_the_table_takes_the_best_rate_by_the_mean_over_seeds() -> None:
    def entry(rate: float, seed: int, accuracy: float) -> dict[str, Any]:
        cell = dataclasses.asdict(Cell("gka", 64, rate, seed))
        return {**cell, "accuracy": accuracy, "steps": 10, "state_size": 4, "parameters": 9, "cpu_seconds": 1.0}

    table = summarise([entry(0.1, 0, 0.9), entry(0.1, 1, 0.1), entry(0.2, 0, 0.6), entry(0.2, 1, 0.7)])
    (row,) = table
    assert (row["learning_rate"], row["accuracy"], row["lowest"], row["highest"]) == (0.2, 0.65, 0.6, 0.7)
    assert (row["seeds"], row["learning_rates"]) == (2, 2)
    text = format_table({"table": table, "runs": [{"cpu_seconds": 90.0, "seconds": 60.0}]}, tiny())
    assert all(number in text for number in ("0.650", "0.600", "0.700", "1.5", "1.0"))


def _axes(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[axis.name] for axis in dataclasses.fields(Cell))
