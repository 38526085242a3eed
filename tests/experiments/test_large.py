"""The experiment large: the text of packages, the plan, trainings that stop and resume, the rules of its page."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import assert_drawn, rows_of
from transformers import AutoModelForCausalLM

from experiments import __main__ as command_line
from experiments.evidence import command, corpus, large, large_page, large_training, packages, table
from experiments.evidence.page import write_page
from experiments.evidence.record import Record
from experiments.evidence.skeleton import TOLERANCE, count_parameters
from gka.cli.machine import describe_command
from gka.training.errors import UserError

CPU = torch.device("cpu")
STEPS = 6


def lines(seed: int, count: int = 40) -> list[str]:
    draw = random.Random(seed)
    return [f"value_{draw.randrange(10**9)} = function_{draw.randrange(10**9)}()" for _ in range(count)]


# The text of packages


def test_near_copies_are_left_out(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    files = {
        one / "a/code.py": lines(0),
        one / "b/indented.py": [f"    {line.replace(' = ', '  =  ')}" for line in lines(0)],
        two / "a/code.py": [*lines(0)[:34], *lines(1)[:6]],  # 85% known
        two / "c/half.py": [*lines(0)[:20], *lines(2)[:20]],
        two / "c/data.json": lines(3),
        two / "c/minified.js": ["x" * 1001, *lines(4)],
        two / "c/table.py": ["0" * 101] * 40,
        two / "c/short.txt": ["a few", "words"],
        two / "c/huge.py": lines(5, 30_000),
    }
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(content))
    sizes = {path.name if path.parent.name != "a" else str(path): path.stat().st_size for path in files}
    counts = packages.write_package_text(tmp_path / "text", [one, two])
    kept = {
        path.relative_to(tmp_path / "text").as_posix()
        for path in (tmp_path / "text").rglob("*.*")
        if path.is_file()
    }
    assert kept == {"0/a/code.py", "1/c/half.py", ".counts.json"}
    assert (tmp_path / "text/0/a/code.py").read_bytes() == (one / "a/code.py").read_bytes()
    assert counts == {
        "files": 2,
        "bytes": sizes[str(one / "a/code.py")] + sizes["half.py"],
        "large": sizes["huge.py"],
        "generated": sizes["minified.js"] + sizes["table.py"],
        "copied": sizes["indented.py"] + sizes[str(two / "a/code.py")] + sizes["short.txt"],
    }
    shutil.rmtree(one)
    assert packages.write_package_text(tmp_path / "text", [one, two]) == counts  # it is there already


def test_packages_are_found_where_they_are_installed() -> None:
    folders = packages.package_folders()
    for module in (torch, json):
        assert any(folder in Path(module.__file__).resolve().parents for folder in folders)
    assert len(set(folders)) == len(folders)


# Plan and trainings


def test_a_step_has_the_same_sequences_on_any_number_of_processes() -> None:
    for number in (1, 2, 4, 8, 32):
        rows, batches = large_training.split_batch(32, number)
        assert rows * batches * number == 32 and rows <= 8
    with pytest.raises(UserError, match="started 3 processes; expected a divisor of 32"):
        large_training.split_batch(32, 3)


def test_models_are_those_of_the_recipe_and_equal_in_size() -> None:
    plan, *models = large.cells("full")
    assert plan["mixers"] == [cell["mixer"] for cell in models] == ["gka", "gdn_fla", "attention"]
    cell = models[0]
    assert (cell["hidden_size"], cell["num_hidden_layers"], cell["learning_rate"]) == (1024, 28, 1e-3)
    fields = {name: cell[name] for name in large_training.MODEL_FIELDS}
    sizes = [
        count_parameters(large_training.skeleton(mixer, vocab_size=32_000, **fields))
        for mixer in ("gka", "attention")
    ]
    assert 440e6 < sizes[0] < 470e6 and abs(sizes[1] / sizes[0] - 1) < TOLERANCE


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (folder / f"{number}.py").write_text("\n".join(lines(number)))
    return folder


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of the small size, whose plan says six steps."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large, "step_seconds", lambda *_: 0.1)
        patch.setattr(large, "_SAVE_SECONDS", 0.4)  # a checkpoint after four steps
        budget = STEPS * 0.3 / 60 / large.SHARE + 1e-9
        command.measure("large", "small", output, [], "cpu", [str(texts)], given={"budget": budget})
    return output


def results(output: Path) -> dict[str, Any]:
    return {e["cell"].get("mixer", "plan"): e["result"] for e in Record(output / "large.json", "large").entries}


def weights(output: Path, mixer: str = "gka") -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(output / "large-models" / "small" / mixer)
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


SAME = ("train loss", "gradient norms", "evaluations", "held out", "windows", "tokens", "spikes")


def test_every_mixer_has_the_steps_of_the_plan(whole: Path, tmp_path: Path) -> None:
    found = results(whole)
    plan = found.pop("plan")
    assert plan["steps"] == STEPS and plan["tokens"] == STEPS * 4 * 64 and not plan["left out"]
    assert [*found] == ["gka", "gdn", "attention"]
    for result in found.values():
        assert [step for step, _ in result["train loss"]] == [step for step, _ in result["gradient norms"]]
        assert len(result["train loss"]) == STEPS and result["starts"] == [0] and result["diverged"] is None
        assert result["evaluations"][-1][0] == STEPS and result["tokens per second"] > 0
        nats, tokens = (sum(column) for column in zip(*result["windows"], strict=True))
        assert nats / tokens == pytest.approx(result["held out"]["loss"], abs=1e-4)
        assert result["flops per token"] > 6 * 64 * 64 and result["peak flops"] is None
    assert found["gka"]["train loss"] != found["attention"]["train loss"]
    shutil.copytree(whole, tmp_path / "it", ignore=lambda *_: ["large-models"])
    pages = [write_page(tmp_path / "it").read_text(), (tmp_path / "it" / "large.md").read_text()]
    for page, result in itertools.product(pages, found.values()):
        assert f"{result['held out']['loss']:.4f}" in page
    assert_drawn(tmp_path / "it" / "large.png")


@pytest.fixture
def planned(whole: Path, tmp_path: Path) -> Path:
    """The text and the plan of the undisturbed run, without its trainings."""
    output = tmp_path / "run"
    shutil.copytree(whole / "corpus-large-small", output / "corpus-large-small")
    entries = json.loads((whole / "large.json").read_text())
    entries["cells"] = [entry for entry in entries["cells"] if entry["cell"]["part"] == "plan"]
    (output / "large.json").write_text(json.dumps(entries))
    return output


def test_a_training_that_is_stopped_resumes(
    whole: Path, planned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the clock and by a signal; it ends as if it had not been."""
    run = ["evidence", "large", "--only", "mixer=gka", "--device", "cpu", "--output", str(planned)]
    clock = itertools.chain([0.0] * 2, itertools.repeat(math.inf))
    monkeypatch.setattr(large, "_SAVE_SECONDS", 0.4)
    with monkeypatch.context() as patch:
        patch.setattr(large_training, "monotonic", lambda: next(clock))
        assert command_line.main([*run, "--minutes", "10"]) == 0
    captured = capsys.readouterr()
    assert "the next start of the command resumes it" in captured.err and "1 cells have no result" in captured.err

    def kill(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(large_training.StepClock, "on_step_end", kill)
        assert command_line.main(run) == 130
    assert command_line.main(run) == 0
    again, undisturbed = results(planned)["gka"], results(whole)["gka"]
    assert again["starts"] == [0, 3, 4]
    for name in SAME:
        assert again[name] == undisturbed[name], name
    assert torch.equal(weights(planned), weights(whole))
    page = large.section(Record(planned / "large.json", "large").entries, planned / "large.png")
    assert "stopped and resumed 2 times" in page and "3, 4" in rows_of(page)[-1]


def test_a_mixer_that_does_not_run_is_left_out(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def seconds(cell: Any, mixer: str, *_: Any) -> float:
        if mixer == failing:
            raise RuntimeError("Triton is too old\nmore")
        return 0.1

    monkeypatch.setattr(large, "step_seconds", seconds)
    arguments: Any = ("large", "small", tmp_path, ["part=plan"], "cpu", [str(texts)])
    failing = "gka"
    with pytest.raises(RuntimeError):
        command.measure(*arguments)
    failing = "gdn"
    command.measure(*arguments, given={"budget": 1.0})
    plan = results(tmp_path)["plan"]
    assert plan["left out"] == {"gdn": "RuntimeError: Triton is too old"} and plan["steps"] == int(
        60 * large.SHARE / 0.2
    )
    entries = Record(tmp_path / "large.json", "large").entries
    assert large.prepare(tmp_path, "small", None)["budget"] == 1.0  # that of the plan
    fields = {name: value for name, value in entries[0]["cell"].items() if name not in ("part", "mixers")}
    models = [{"part": "model", "mixer": mixer, **fields} for mixer in ("gka", "gdn")]
    assert [large.ready(cell, entries) for cell in models] == [True, None]
    assert large.ready(models[0], []) is False
    assert "Gated DeltaNet did not run here (RuntimeError: Triton is too old)" in large.section(
        entries, tmp_path / "x.png"
    )
    with pytest.raises(UserError, match="too short for one step"):
        command.measure(*arguments, given={"budget": 1e-5})


def test_the_speed_is_that_of_steps(whole: Path, tmp_path: Path) -> None:
    cell = {**large.cells("small")[0], "size": "small"}
    data = corpus.Corpus.load(whole, "large-small")
    seconds = large_training.step_seconds(cell, "attention", data, tmp_path, CPU)
    assert 0 < seconds < 5 and not list(tmp_path.glob("checkpoint*"))


def test_options_of_other_experiments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--budget 1\.0: numerics has no such option"):
        command.measure("numerics", "small", tmp_path, [], "cpu", given={"budget": 1.0})
    with pytest.raises(UserError, match="--processes 2: a training of large uses all GPUs; start it by torchrun"):
        command.measure("large", "small", tmp_path, [], "cpu", processes=2)


def test_torchrun_is_for_trainings_on_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun started 2 processes; expected one for numerics"):
        command.measure("numerics", "small", tmp_path, [], "cpu")


def test_the_command_of_a_result_has_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/experiments/__main__.py", "evidence", "large"])
    assert describe_command() == "python -m experiments evidence large"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert describe_command() == "torchrun --nproc_per_node 4 -m experiments evidence large"


# The page


def entry(mixer: str, losses: list[float], **changes: Any) -> dict[str, Any]:
    """A made-up training; every window has ten tokens."""
    cell = {**large.cells("full")[1], "mixer": mixer, "budget": 20.0, "size": "full"}
    mean = sum(losses) / len(losses)
    result = {
        "parameters": 455e6, "tokens": 100 * 32 * 4096, "processes": 4, "flops per token": 3e9,
        "peak flops": 989e12,
        "train loss": [[step, 5 - step / 50] for step in range(1, 101)],
        "gradient norms": [[step, 9.0 if step <= 5 else 0.5] for step in range(1, 101)],
        "evaluations": [[50, 4.1], [100, 3.2]], "starts": [0], "tokens per second": 300_000, "peak bytes": 70e9,
        "spikes": [], "diverged": None, "held out": {"loss": mean, "recall_loss": 1.5, "other_loss": 2.5},
        "windows": [[10 * loss, 10] for loss in losses], "corpus": {
            "train": {"files": 100, "tokens": 10_000_000}, "validation": {"files": 5},
        },
    }  # fmt: skip
    return {"cell": cell, "result": {**result, **changes}}


PLAN = {
    "cell": {**large.cells("full")[0], "budget": 20.0, "size": "full"},
    "result": {"steps": 100, "tokens": 100 * 32 * 4096, "left out": {}},
}


def page(tmp_path: Path, *models: dict[str, Any]) -> str:
    return large.section([PLAN, *models], tmp_path / "large.png")


def test_differences_are_said_with_their_error(tmp_path: Path) -> None:
    ours = [2.0, 3.0, 1.0, 2.0]
    better = entry("gdn_fla", [loss - 0.1 - 0.01 * n for n, loss in enumerate(ours)])
    unclear = entry("attention", [1.5, 3.6, 0.9, 2.1])
    text = page(tmp_path, entry("gka", ours), better, unclear)
    assert (
        "The held-out loss of GKA is 2.0000: 0.1150 ± 0.0065 higher than with Gated DeltaNet, no difference from"
        in text
    )
    assert "softmax attention beyond 2 standard errors (-0.0250 ± 0.2287)" in text
    text = page(tmp_path, entry("gka", ours), entry("gdn_fla", [loss + 0.2 for loss in ours]))
    assert "0.2000 ± 0.0000 lower than with Gated DeltaNet" in text
    assert (
        "No training diverged; spikes of the gradient norm: none." in text
        and "10 million tokens, read 1.3 times" in text
    )
    row = next(row for row in rows_of(text) if row[0] == "GKA")
    assert row == ["GKA", "455.00", "2.0000", "1.5000", "2.5000", "300,000", "0.228", "70.0", "0.50", "0", "never"]
    assert_drawn(tmp_path / "large.png")


def test_the_error_is_that_of_a_ratio() -> None:
    """Windows that differ in length alone have no error."""
    mean, error = table.paired([[10.0, 5], [30.0, 15]], [[11.0, 5], [33.0, 15]])
    assert mean == pytest.approx(0.2) and error == pytest.approx(0.0, abs=1e-12)
    assert table.paired([[10.0, 5]], [[11.0, 5]])[1] == math.inf


def test_a_training_that_diverged_or_was_resumed_is_said(tmp_path: Path) -> None:
    lost = entry("gdn_fla", [2.0, 3.0], diverged=40, windows=None, **{"held out": None, "tokens per second": None})
    spiky = entry("gka", [2.0, 3.0], spikes=[50, 60], starts=[0, 40, 80])
    text = page(tmp_path, spiky, lost)
    assert "Diverged: Gated DeltaNet at step 40; spikes of the gradient norm: 2 with GKA;" in text
    assert "resumed once." in page(tmp_path, entry("gka", [2.0, 3.0], starts=[0, 40]))
    assert "stopped and resumed 2 times" in text and "The held-out loss of GKA is 2.5000." in text
    rows = {row[0]: row for row in rows_of(text)}
    assert rows["Gated DeltaNet"][2] == "diverged at step 40" and rows["GKA"][-1] == "40, 80"
    short = large_page.overview([PLAN, spiky, lost])
    assert ["Gated DeltaNet", "diverged at step 40", "", "", ""] in rows_of(short) and "Diverged: Gated" in short
    assert "held-out loss of GKA" not in page(tmp_path, lost)
    assert rows_of(page(tmp_path)) == []
