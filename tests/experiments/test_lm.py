"""The experiment lm: its text, its trainings, and the models that it keeps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import assert_drawn, rows_of
from transformers import AutoModelForCausalLM, set_seed

import gka
from experiments.evidence import command, corpus, lm, lm_page
from experiments.evidence.record import Record
from experiments.evidence.skeleton import TOLERANCE, count_parameters
from experiments.evidence.training import Trained, train
from gka.training.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty files of words; one stands there three times."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(60)]
    for number in range(20):
        (folder / f"{number}.py").write_text(" ".join(rng.choice(words, 300)) + f"\n# file {number}\n")
    for name in ("copy.py", "again.py"):
        (folder / name).write_bytes((folder / "0.py").read_bytes())
    return folder


@pytest.fixture(scope="module")
def output(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evidence")
    corpus.prepare(folder, "small", [str(text)])
    return folder


def test_the_text_is_read_once_and_held_out_text_is_not_trained_on(output: Path, text: Path) -> None:
    found = corpus.Corpus.load(output, "small")
    end = found.tokenizer.eos_token_id
    parts = {}
    for name in ("train", "validation"):
        tokens = np.fromfile(output / f"corpus-small/data/{name}.bin", found.manifest.dtype)
        ends = np.flatnonzero(tokens == end)
        pieces = np.split(tokens, ends + 1)[:-1]
        parts[name] = {found.tokenizer.decode(piece[:-1]) for piece in pieces}
        assert len(parts[name]) == len(pieces) == getattr(found.manifest, name).files > 0
    assert not parts["train"] & parts["validation"]
    assert parts["train"] | parts["validation"] == {path.read_text() for path in text.iterdir()}


def test_a_corpus_is_that_of_its_files(output: Path, text: Path, tmp_path: Path) -> None:
    known = corpus.prepare(output, "small", None)
    assert known == corpus.prepare(output, "small", [str(text)]) == corpus.prepare(tmp_path, "small", [str(text)])
    with pytest.raises(UserError, match="was made from"):
        corpus.prepare(output, "small", [str(text / "1.py")])
    with pytest.raises(UserError, match="numerics reads no text"):
        command.measure("numerics", "small", tmp_path, [], "cpu", data=[str(text)])


def trained(output: Path, folder: Path, steps: int = 6, **options: Any) -> tuple[Trained, torch.Tensor]:
    """A training of a tiny model, and all its weights."""
    data = corpus.Corpus.load(output, "small")
    set_seed(0)
    model = gka.GKAForCausalLM(lm.language_model("gla", "small", len(data.tokenizer), data.tokenizer.eos_token_id))
    arguments: dict[str, Any] = dict(
        learning_rate=1e-2, steps=steps, batch_size=2, seed=0, device=CPU, dtype="float32", log_every=1
    )
    found = train(model, data.train_blocks(32, 512), folder, **arguments | options)  # type: ignore[arg-type]
    return found, torch.cat([weight.detach().flatten() for weight in model.parameters()])


def test_a_training_that_is_cut_off_goes_on(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends where it would have ended."""
    whole, weights = trained(output, tmp_path / "whole")
    assert [step for step, _ in whole.loss] == [step for step, _ in whole.grad_norms] == [1, 2, 3, 4, 5, 6]
    assert whole.loss[-1][1] < whole.loss[0][1] and whole.diverged is None and whole.tokens_per_second
    from experiments.evidence import training

    def cut(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.StepClock, "on_step_end", cut)
        trained(output, tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-4"]
    again, same = trained(output, tmp_path / "cut")
    assert again.loss == whole.loss and torch.equal(same, weights)


def test_a_training_that_diverges_says_where(output: Path, tmp_path: Path) -> None:
    found, _ = trained(output, tmp_path, learning_rate=1e30)
    assert found.diverged is not None and len(found.loss) < 6


def test_models_are_equal_in_size() -> None:
    sizes = {mixer: count_parameters(lm.language_model(mixer, "full", 8192, 0)) for mixer in lm_page.ALL}
    assert all(abs(size - sizes["gka"]) <= TOLERANCE * sizes["gka"] for size in sizes.values())
    assert 17e6 < sizes["gka"] < 21e6
    kinds = lm.language_model("hybrid", "full", 8192, 0).layer_types
    assert [number for number, kind in enumerate(kinds, 1) if kind == "full_attention"] == [6]


def test_mixers_take_turns_in_the_measurement_of_speed() -> None:
    turns = [cell["mixer"] for cell in lm.cells("full") if cell["part"] == "speed"]
    assert turns == [*lm_page.FULL] * lm.ROUNDS and lm.ROUNDS >= 3


def test_the_best_rate_trains_the_model_that_is_kept(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="1 of 1 cells failed"):
        command.measure("lm", "small", output, ["mixer=gla", "part=model"], "cpu")
    assert "have not been tried with gla" in capsys.readouterr().err
    command.measure("lm", "small", output, ["mixer=gla"], "cpu")
    entries = Record(output / "lm.json", "lm").entries
    *short, whole, speed = entries
    assert speed["cell"]["part"] == "speed" and speed["result"]["tokens per second"] > 0
    losses = {entry["cell"]["learning_rate"]: entry["result"]["held out"]["loss"] for entry in short}
    assert len(losses) == 2 and whole["result"]["learning_rate"] == min(losses, key=losses.__getitem__)
    model = AutoModelForCausalLM.from_pretrained(lm.model_folder(output, "small", "gla"))
    assert model.config.use_cache
    data = corpus.Corpus.load(output, "small")
    again = corpus.evaluate(model, data, context=64, max_bytes=4_000, batch_size=2, autocast=False)
    assert again.loss == pytest.approx(whole["result"]["held out"]["loss"], rel=1e-5)
    kept = lm.model_folder(output, "small", "gla") / "model.safetensors"
    before = kept.stat().st_mtime_ns
    other = lm.run({**whole["cell"], "seed": 1}, output / "lm" / "other", CPU)  # with the same rate, and not kept
    assert other["learning_rate"] == whole["result"]["learning_rate"] and kept.stat().st_mtime_ns == before
    assert other["held out"]["loss"] != whole["result"]["held out"]["loss"]
    page = lm.section(entries, tmp_path / "lm.png")
    assert f"{again.loss:.4f}" in page and f"{speed['result']['tokens per second']:,}" in page
    assert_drawn(tmp_path / "lm.png")


def test_the_page_of_a_training_that_diverged(tmp_path: Path) -> None:
    cell = next(cell for cell in lm.cells("full") if cell["part"] == "model")
    result = {
        "learning_rate": 0.01, "parameters": 1, "train loss": [[1, 2.0]], "gradient norms": [[1, 1.0]],
        "diverged": 2, "held out": None,
    }  # fmt: skip
    assert re.search(r"diverged\D*2\b", lm.section([{"cell": cell, "result": result}], tmp_path / "lm.png"))


def test_the_page_names_mixers_that_are_not_trained_yet(tmp_path: Path) -> None:
    cells = lm.cells("full")
    held_out = {
        "loss": 2.0,
        "bits_per_byte": 1.0,
        "recall_loss": None,
        "other_loss": 2.0,
        "recall": [],
        "positions": [],
    }
    result = {
        "learning_rate": 0.01, "parameters": 1, "train loss": [[1, 2.0]], "gradient norms": [[1, 1.0]],
        "diverged": None, "held out": held_out,
    }  # fmt: skip
    model = next(cell for cell in cells if cell["part"] == "model" and cell["mixer"] == "gka")
    rate = next(cell for cell in cells if cell["part"] == "rate" and cell["mixer"] == "mamba2")
    with_rate = lm.section([{"cell": cell, "result": result} for cell in (model, rate)], tmp_path / "lm.png")
    alone = lm.section([{"cell": model, "result": result}], tmp_path / "lm.png")
    findings = "\n".join(line for line in with_rate.splitlines() if not line.startswith("|"))
    assert "Mamba-2" in findings and "Mamba-2" not in alone


def test_other_seeds_are_shown_beside_the_first(tmp_path: Path) -> None:
    models = [cell for cell in lm.cells("full") if cell["part"] == "model"]
    assert [(cell["mixer"], cell["seed"]) for cell in models] == [
        (m, seed) for seed in (0, 1, 2) for m in lm_page.FULL
    ]
    losses = {("gka", 0): 2.0, ("gka", 1): 2.2, ("gka", 2): 2.1, ("gdn", 0): 1.9, ("gdn", 1): 2.4}
    entries = []
    for cell in models:
        if loss := losses.get((cell["mixer"], cell["seed"])):
            held_out = {"loss": loss, "bits_per_byte": loss / 2, "recall_loss": 3.0, "other_loss": 1.0}
            bins = [{"first": 2, "last": 3, "loss": loss, "tokens": 1}]
            bins += [{"first": 4, "last": 7, "loss": None, "tokens": 0}]
            result = {
                "learning_rate": 0.01, "parameters": 1, "train loss": [[1, 2.0]], "gradient norms": [[1, loss]],
                "diverged": None, "held out": {**held_out, "recall": bins, "positions": bins[:1]},
            }  # fmt: skip
            entries.append({"cell": cell, "result": result})
    for cell in lm.cells("full"):
        if cell["part"] == "speed" and cell["mixer"] == "gka":
            speed = {"tokens per second": (3000, 1000, 2500)[cell["round"]], "peak bytes": 4_000_000_000}
            entries.append({"cell": cell, "result": speed})
    page = lm.section(entries, tmp_path / "lm.png")
    rows = rows_of(page)
    ours, gdn = (next(row for row in rows if row[0] == name) for name in ("GKA", "Gated DeltaNet"))
    for cell in ("2.1000 (2.0000 to 2.2000)", "1.0500 (1.0000 to 1.1000)", "3.000 (3.000 to 3.000)"):
        assert cell in ours
    assert ours[-2:] == ["2,500 (1,000 to 3,000)", "4.0"] and gdn[-2:] == ["", ""]
    assert rows.count(["2 to 3", "2.100", "2.150"]) == 2 and rows.count(["4 to 7", "", ""]) == 1
    assert "+0.0500 (-0.1000 to +0.2000) for Gated DeltaNet" in page
    assert re.search(r"Gated DeltaNet.*holds for 1 of 2 seeds", page)
    gdn = next(entry for entry in entries if entry["cell"]["mixer"] == "gdn")
    gdn["result"] |= {"held out": None, "diverged": 2}
    page = lm.section(entries, tmp_path / "lm.png")
    rows = rows_of(page)
    assert any("not finite in 1 of 2" in row for row in rows) and rows.count(["2 to 3", "2.100"]) == 2
