"""`experiments evidence`: results are whole, nothing is measured twice, the page says what was measured."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import assert_drawn, rows_of

from experiments import __main__ as command_line
from experiments.evidence import command, cost, mqar, mqar_page, numerics
from experiments.evidence.page import about_age, shown, sources_of, write_page
from experiments.evidence.record import Record
from experiments.evidence.table import spread
from experiments.tasks.mqar import make_mqar
from gka.training.errors import UserError


def test_a_record_keeps_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "made" / "it.json"
    cells: list[dict[str, Any]] = [{"a": 1, "b": [2, 3]}, {"a": 2, "b": []}]
    record = Record(path, "it")
    assert record.missing(cells) == cells and not path.exists()
    record.add({"b": [2, 3], "a": 1}, {"x": 0.5}, 1.234)
    again = Record(path, "it")
    assert again.missing(cells) == [cells[1]]
    again.add(cells[1], [None, "y"], 2.0)
    content = json.loads(path.read_text())
    assert [(e["cell"]["a"], e["run"], e["seconds"], e["result"]) for e in content["cells"]] == [
        (1, 0, 1.23, {"x": 0.5}),
        (2, 1, 2.0, [None, "y"]),
    ]
    assert all(
        run.keys() >= {"command", "commit", "date", "started", "machine", "versions"} for run in content["runs"]
    )
    assert [path.name for path in path.parent.iterdir()] == ["it.json"]


def test_a_record_refuses_what_it_cannot_keep(tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    record = Record(path, "it")
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.add({"a": 1}, math.nan, 1.0)
    assert not path.exists() and record.missing([{"a": 1}])
    record.add({"a": 1}, 1, 1.0)
    with pytest.raises(ValueError, match="already has a result"):
        record.add({"a": 1}, 2, 1.0)
    with pytest.raises(UserError, match="contains results of 'it', not of 'other'"):
        Record(path, "other")
    for text in ("{", "[]", '{"experiment": "it", "runs": [], "cells": [{"cell": {}, "run": 0, "result": 1}]}'):
        path.write_text(text)
        with pytest.raises(UserError, match="contains no results of an experiment"):
            Record(path, "it")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """An experiment in the place of numerics, whose cells are counted when they are measured."""
    calls: list[dict[str, Any]] = []

    def run(cell: dict[str, Any], folder: Path, device: Any) -> int:
        calls.append(cell)
        if cell["seed"] == 2 and len(calls) == 3:
            (folder / "checkpoint").mkdir(parents=True)
            raise KeyboardInterrupt
        return 10 * cell["seed"]

    monkeypatch.setattr(numerics, "cells", lambda size: [{"seed": seed} for seed in range(4)])
    monkeypatch.setattr(numerics, "run", run)
    return calls


def test_a_run_that_is_cut_off_goes_on(counted: list[dict[str, Any]], tmp_path: Path) -> None:
    """With what it has, and with the folder of the cell that was cut."""
    arguments = ["evidence", "numerics", "--output", str(tmp_path)]
    assert command_line.main(arguments) == 130
    assert len(list(tmp_path.glob("numerics/*/checkpoint"))) == 1
    assert command_line.main(arguments) == 0
    assert [cell["seed"] for cell in counted] == [0, 1, 2, 2, 3]
    assert command_line.main(arguments) == 0 and len(counted) == 5
    entries = Record(tmp_path / "numerics.json", "numerics").entries
    assert [entry["result"] for entry in entries] == [0, 10, 20, 30]
    assert not list(tmp_path.glob("numerics/*"))


def test_two_processes_may_measure_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    first, second = Record(path, "it"), Record(path, "it")
    first.add({"a": 1}, 1, 1.0)
    second.add({"a": 2}, 2, 1.0)
    first.add({"a": 3}, 3, 1.0)
    with pytest.raises(ValueError, match="already has a result"):
        second.add({"a": 3}, 3, 1.0)
    record = Record(path, "it")
    assert [(entry["cell"]["a"], entry["run"]) for entry in record.entries] == [(1, 0), (2, 1), (3, 0)]
    assert len(record.content["runs"]) == 2


def test_a_cell_that_fails_does_not_keep_others_from_being_measured(
    counted: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(cell: dict[str, Any], folder: Path, device: Any) -> int:
        if cell["seed"] == 1:
            raise RuntimeError("no kernel")
        return 0

    monkeypatch.setattr(numerics, "run", run)
    assert command_line.main(["evidence", "numerics", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "seed=1: RuntimeError: no kernel" in error and "1 of 4 cells failed" in error
    seeds = [entry["cell"]["seed"] for entry in Record(tmp_path / "numerics.json", "numerics").entries]
    assert seeds == [0, 2, 3]


def test_sizes_and_machines_are_not_mixed(tmp_path: Path) -> None:
    cells = [{"size": "small"}, {"size": "full", "machine": "A"}, {"size": "full", "machine": "B"}]
    entries = [{"cell": {**cell, "n": n}} for n, cell in enumerate([*cells, {"size": "small"}])]
    assert [entry["cell"]["n"] for entry in shown(entries)] == [2]
    assert [entry["cell"]["n"] for entry in shown([entries[0], entries[3]])] == [0, 3]
    assert command.measure("cost", "small", tmp_path, ["mixer=gla", "tokens=256", "what=forward"], "cpu") is None
    (entry,) = Record(tmp_path / "cost.json", "cost").entries
    assert entry["cell"]["size"] == "small" and entry["cell"]["machine"]


def test_a_page_of_what_there_is_so_far(tmp_path: Path) -> None:
    folder = tmp_path / "evidence"
    command.measure("numerics", "small", folder, ["part=strengths"], "cpu")
    command.measure("cost", "small", folder, ["mixer=gla", "tokens=256"], "cpu")
    page = write_page(folder)
    assert page == tmp_path / "evidence.md"
    text = page.read_text(encoding="utf-8")
    assert re.findall("^## ([a-z_]+)", text, re.M) == ["numerics", "cost"]
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert pictures == ["evidence/numerics.png", "evidence/cost.png"]
    for picture in pictures:
        assert_drawn(tmp_path / picture)
    assert "Repeat it: `python -m experiments evidence cost`" in text
    full = (folder / "numerics.md").read_text(encoding="utf-8")
    assert "[the evidence page](../evidence.md)" in full and "## Commands" in full and "now." not in full
    assert len(rows_of(full)) > 2 and "](numerics.png)" in full


def test_a_page_says_that_results_are_old(tmp_path: Path) -> None:
    record = Record(tmp_path / "evidence" / "cost.json", "cost")
    result = {"seconds": [0.25, 0.2, 0.3], "peak bytes": 5_000_000, "cache bytes": 18, "by": "gka"}
    record.add(
        {
            "mixer": "gka",
            "what": "forward",
            "tokens": 8,
            "size": "small",
            "hidden_size": 32,
            "num_attention_heads": 2,
        },
        result,
        1.0,
    )
    (run,) = record.content["runs"]
    for date, command_then, expected in (
        ("2026-11-27", "gka evidence cost", True),
        ("2026-11-28", "python -m experiments evidence cost", False),
    ):
        run |= {"date": date, "command": command_then}
        record.path.write_text(json.dumps(record.content))
        text = write_page(tmp_path / "evidence").read_text(encoding="utf-8")
        full = (tmp_path / "evidence" / "cost.md").read_text(encoding="utf-8")
        assert ("older than a correction" in text) == ("older than a correction" in full) == expected
        assert ("`gka evidence` is `python -m experiments evidence` now" in full) == expected


def test_a_page_names_the_results_that_are_old(tmp_path: Path) -> None:
    record = Record(tmp_path / "lm.json", "lm")
    kinds = (("gka", "model", True), ("gka", "speed", False), ("hybrid", "model", False), ("gla", "model", False))
    entries = [{"cell": {"mixer": mixer, "part": part}, "run": int(new)} for mixer, part, new in kinds]
    record.content["runs"] = [{"date": "2026-11-27"}, {"date": "2026-11-29"}]
    said = about_age(record, entries)
    assert "(2026-11-28): tokens/s of GKA, hybrid of GKA and softmax attention. In" in said
    assert said.endswith("forward + backward 8% slower.")
    assert about_age(record, entries[1:]).startswith("These results are older")
    assert about_age(record, entries[:1]) == about_age(record, entries[3:]) == ""


def test_only_some_cells(counted: list[dict[str, Any]], tmp_path: Path) -> None:
    arguments = ["evidence", "numerics", "--output", str(tmp_path), "--only"]
    assert command_line.main([*arguments, "seed=1"]) == 0
    assert [cell["seed"] for cell in counted] == [1]
    assert command_line.main([*arguments, "seed=9"]) == command_line.main([*arguments, "seed"]) == 2
    assert len(counted) == 1
    assert command_line.main([*arguments, "seed=1|3"]) == 0
    assert [cell["seed"] for cell in counted] == [1, 3]


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command_line.main(["evidence"]) == command_line.main(["evidence", "numerix"]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in (*command.EXPERIMENTS, "page", "'numerix'"))
    assert command_line.main(["evidence", "page", "--output", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err and not tmp_path.with_name(f"{tmp_path.name}.md").exists()


def test_numbers_with_their_spread() -> None:
    assert spread([2.0, 1.0, 4.0]) == "2.0e+00 (1.0e+00 to 4.0e+00)"
    assert spread([0.25], ".2f") == "0.25" and spread([]) == ""
    assert spread([1.0, None, math.nan]) == "not finite in 2 of 3" and spread([None]) == "not finite"


# The experiment numerics


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    """Some cells of the small form."""
    wanted = [
        cell
        for cell in numerics.cells("small")
        if (cell["part"] == "iterations" and "Cheb" in cell["solver"])
        or (cell["part"] == "recursion" and "bfloat16" in cell["method"])
        or (cell["part"] == "strengths" and cell["dtype"] == "float32")
        or (cell["part"] == "retention" and cell["ridge_ratio"] in (0.01, 0.1, None) and cell["log_gate"] != -0.01)
        or (cell["part"] == "gradients" and cell["layers"] == 1 and "nodes" in cell["solver"])
    ]
    return [{"cell": cell, "result": numerics.run(cell, Path(), None)} for cell in wanted]  # type: ignore[arg-type]


def result(entries: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (found,) = [entry["result"] for entry in entries if wanted.items() <= entry["cell"].items()]
    return found


def test_refinement_goes_below_what_bfloat16_products_allow(measured: list[dict[str, Any]]) -> None:
    for part in ("iterations", "gradients"):
        plain, refined = (
            result(measured, part=part, solver=solver, dtype="bfloat16")["error"]
            for solver in ("Chebyshev, nodes", "Chebyshev, nodes, refined")
        )
        assert refined[-1] < plain[-1] / 5
    exact = result(measured, part="iterations", solver="Chebyshev, nodes", dtype="float32")
    assert exact["error"][-1] < 1e-6 and exact["residual"][-1] < 1e-6
    assert exact["products"] == numerics.PRODUCTS


def test_a_stronger_ridge_converges_sooner(measured: list[dict[str, Any]]) -> None:
    errors = [result(measured, part="strengths", ridge_ratio=a)["error"] for a in numerics.STRENGTHS]
    at = numerics.PRODUCTS.index(20)
    assert all(later[at] < earlier[at] / 2 for earlier, later in itertools.pairwise(errors))


def test_the_solve_retains_more_and_a_gate_forgets(measured: list[dict[str, Any]]) -> None:
    def kept(a: float | None, g: float) -> list[float]:
        found = result(measured, part="retention", ridge_ratio=a, log_gate=g)
        assert found["lags"] == [0, 4, 16]
        return found["cosine"]  # type: ignore[no-any-return]

    assert all(x > y > z for x, y, z in zip(kept(0.01, -0.1), kept(0.1, -0.1), kept(None, -0.1), strict=True))
    assert kept(0.01, -0.1)[1] > 0.98 and kept(None, -0.1)[2] < 0.75
    assert kept(0.1, 0.0)[0] < kept(0.1, -0.001)[0] < kept(0.1, -0.1)[0]


def test_the_layers_solve_is_more_exact_than_the_recursion(measured: list[dict[str, Any]]) -> None:
    recursion, refined = (
        result(measured, part="recursion", method=method)["error"][-1]
        for method in ("Kalman recursion in bfloat16", "Chebyshev (16, 16), bfloat16 products")
    )
    assert refined < recursion / 3


def test_all_of_the_full_form_is_other_seeds_and_more_tokens() -> None:
    small, full = numerics.cells("small"), numerics.cells("full")
    assert len(full) == 3 * len(small) and {cell["seed"] for cell in full} == {0, 1, 2}
    parts = [{k: v for k, v in cell.items() if k not in ("tokens", "seed")} for cell in small]
    assert parts == [{k: v for k, v in cell.items() if k not in ("tokens", "seed")} for cell in full[: len(small)]]


def test_measured_anew_it_is_the_same(measured: list[dict[str, Any]]) -> None:
    again = numerics.run(measured[0]["cell"], Path(), None)  # type: ignore[arg-type]
    assert again == measured[0]["result"]


def test_processes_of_one_command_make_one_source() -> None:
    def run(command: str, seconds: float, commit: str = "abc") -> dict[str, Any]:
        machine = {"gpu": None, "processor": "a processor"}
        return {
            "command": command, "seconds": seconds, "commit": commit, "date": "2026-01-02", "machine": machine,
            "versions": {"torch": "2"},
        }  # fmt: skip

    parts = [
        run(f"python -m experiments evidence lm --only mixer={m} 'variant=no gate' --size full", 700)
        for m in ("gka", "gdn")
    ]
    whole = run("python -m experiments evidence lm --size full", 5, commit="def")
    joined, single = sources_of([parts[0], whole, parts[1]])
    for source in (joined, single):
        assert "`python -m experiments evidence lm --size full`" in source
        assert all(part in source for part in ("2026-01-02", "a processor", "torch 2"))
    assert "2 processes" in joined and "1,400 s" in joined and "abc" in joined
    assert "process" not in single.replace("processor", "") and " 5 s" in single and "def" in single


# The experiment mqar


def test_every_mixer_gets_the_same_grid() -> None:
    """The same batches, learning rates and seeds; up to a quarter as many pairs as tokens, and more than dims."""
    cells = mqar.cells("full")
    grids = {
        mixer: [{name: value for name, value in cell.items() if name != "mixer"} for cell in group]
        for mixer in ("gka", "gla", "gdn", "mamba2", "attention")
        for group in [[cell for cell in cells if cell["mixer"] == mixer]]
    }
    assert len(cells) == 5 * len(grids["gka"]) and all(grid == grids["gka"] for grid in grids.values())
    assert {cell["dim"] for cell in cells} == {32, 64, 128, 256} and {cell["seed"] for cell in cells} == {0, 1, 2}
    tested = mqar.tested_tasks(1024)
    assert tested == [(T, T // part) for T in (128, 256, 512, 1024) for part in (16, 8, 4)]
    trained = mqar.training_tasks(1024)
    assert set(tested) < set(trained) and {(64, 4), (1024, 4), (1024, 256)} < set(trained)
    assert all(4 * P <= T for T, P in trained)


def test_batches_are_the_same_for_every_mixer_and_no_test_sequence() -> None:
    first, theirs = (next(c for c in mqar.cells("small") if c["mixer"] == m) for m in ("gka", "gdn"))
    batches, other = mqar.Batches(first), mqar.Batches(theirs)
    assert len(batches) == first["steps"] == len(other)
    for one, same in zip(batches, other, strict=True):  # type: ignore[call-overload]
        assert torch.equal(one["input_ids"], same["input_ids"]) and torch.equal(one["labels"], same["labels"])
        assert one["input_ids"].numel() == first["batch_tokens"]
    again = mqar.Batches({**first, "seed": 1})
    assert not torch.equal(batches.made[-1].inputs, again.made[-1].inputs)
    T, P = mqar.training_tasks(first["longest"])[0]  # made with the seed of the test sequences
    rows = {"seq_len": T, "num_pairs": P, "vocab_size": first["vocab_size"]}
    made = batches.made[0].inputs
    assert torch.equal(made, make_mqar(len(made), **rows).inputs)
    assert not torch.equal(made, make_mqar(len(made), **rows, split="test").inputs)


def test_other_seeds_train_with_the_best_rate(tmp_path: Path) -> None:
    cells = [cell for cell in mqar.cells("small") if cell["mixer"] == "mamba2"]
    *rates, other = [{**cell, "steps": 2, "test_tokens": 64, "size": "small"} for cell in cells]
    folder, device = tmp_path / "mqar" / "x", torch.device("cpu")
    with pytest.raises(UserError, match="not been tried with mamba2"):
        mqar.run(other, folder, device)
    record = Record(tmp_path / "mqar.json", "mqar")
    for cell, accuracy in zip(rates, (0.25, 0.75), strict=True):
        record.add(cell, {"accuracy": [[64, 16, accuracy]], "learning_rate": cell["learning_rate"]}, 0.0)
    found = mqar.run(other, folder, device)
    assert found["learning_rate"] == rates[1]["learning_rate"] and found["diverged"] is None
    assert [tuple(entry[:2]) for entry in found["accuracy"]] == mqar.tested_tasks(128)
    assert all(0 <= accuracy <= 1 for _, _, accuracy in found["accuracy"]) and found["loss"][0][1] > 0
    json.dumps(found, allow_nan=False)


def test_mqar_shows_the_best_rate_with_all_its_seeds(tmp_path: Path) -> None:
    def entry(mixer: str, rate: float, seed: int, accuracy: float) -> dict[str, Any]:
        cell = {
            "mixer": mixer,
            "dim": 32,
            "seed": seed,
            "vocab_size": 64,
            "steps": 2,
            "batch_tokens": 9,
            "longest": 64,
        }
        cell |= {"learning_rate": rate} if seed == 0 else {"rates": [0.1, 0.01]}
        return {"cell": cell, "result": {"accuracy": [[16, 4, accuracy]], "learning_rate": rate}}

    entries = [entry("gka", 0.1, 0, 0.5), entry("gka", 0.01, 0, 0.7), entry("gka", 0.01, 1, 0.8)]
    entries += [entry("gdn", 0.1, 0, 0.9), entry("gdn", 0.1, 1, 0.8), entry("gdn", 0.01, 0, 0.1)]
    ours, gdn = mqar_page.best(entries)
    assert (ours["mixer"], ours["learning_rate"], ours["rates"]) == ("gka", 0.01, {0.1: 0.5, 0.01: 0.7})
    assert ours["accuracies"] == {(16, 4): [0.7, 0.8]} and gdn["accuracies"] == {(16, 4): [0.9, 0.8]}
    text = mqar.section(entries, tmp_path / "picture.png")
    rows = rows_of(text)
    accuracies = ["75.0 (70.0 to 80.0)", "85.0 (80.0 to 90.0)"]
    assert ["16", "4", "32", *accuracies] in rows and ["32", *accuracies] in rows
    assert ["32", "GKA", "70.0", "50.0"] in rows and ["32", "Gated DeltaNet", "10.0", "90.0"] in rows
    assert_drawn(tmp_path / "picture.png")


def test_mqar_says_what_is_refuted_and_what_was_not_learnt(tmp_path: Path) -> None:
    accuracies = {
        "gka": (0.5, 0.6), "gla": (0.7, 0.65), "gdn": (0.4, 0.7), "mamba2": (0.6,), "attention": (0.1, 0.2),
    }  # fmt: skip
    shared = {"dim": 32, "vocab_size": 64, "steps": 2, "batch_tokens": 9, "longest": 64}
    entries = []
    for mixer, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            cell = {"mixer": mixer, **shared, "seed": seed, **({"learning_rate": 0.1} if seed == 0 else {})}
            entries.append({"cell": cell, "result": {"accuracy": [[16, 4, accuracy]], "learning_rate": 0.1}})
    text = mqar.section(entries, tmp_path / "picture.png")
    assert re.search(r"\b1 of Mamba-2 at dim 32", text), "has a seed less than the others"
    fails = re.search(r"GLA [^.,;]*\(1 of 1\b", text)
    assert fails and not re.search(r"(DeltaNet|Mamba-2) [^.,;]*\(1 of 1\b", text), (
        "only GLA is better with every seed"
    )
    assert "Gated DeltaNet, Mamba-2" in text[fails.end() :]
    assert re.search(r"softmax attention at dim 32", text), "has not learnt the task"
    alone = [entry for entry in entries if entry["cell"]["mixer"] in ("gka", "attention")]
    assert len(mqar.section(alone, tmp_path / "picture.png")) < len(text) - 200, "there is nothing to compare"


# The experiment cost


@pytest.mark.parametrize("mixer", ["gka", "attention", "gdn", "mamba2"])
def test_the_cache_grows_with_attention_alone(mixer: str) -> None:
    def measure(T: int, what: str = "decode step") -> dict[str, Any]:
        sizes = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 2}
        cell = {"mixer": mixer, "what": what, "tokens": T, **sizes}
        return cost.run(cell, Path(), torch.device("cpu"))  # type: ignore[no-any-return]

    small, large = measure(10), measure(30)
    if mixer == "attention":
        assert small["cache bytes"] == 10 * 2 * 32 * 4 and large["cache bytes"] == 3 * small["cache bytes"]
    else:
        assert small["cache bytes"] == large["cache bytes"] > 0
    both = measure(20, "forward+backward")
    assert 0 < both["seconds"][1] <= both["seconds"][0] <= both["seconds"][2]
    assert both["by"] == {"gka": "gka", "attention": "PyTorch's scaled_dot_product_attention"}.get(
        mixer, "transformers' PyTorch code"
    )


def test_what_does_not_fit_into_memory_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(*arguments: Any) -> None:
        raise torch.OutOfMemoryError

    cells = [cell for cell in cost.cells("small") if cell["mixer"] in ("gka", "attention")]
    result = {"seconds": [0.25, 0.2, 0.3], "peak bytes": 5_000_000, "cache bytes": 18, "by": "gka"}
    entries = [{"cell": cell, "result": {**result}} for cell in cells]
    monkeypatch.setattr(cost, "_measure", measure)
    entries[-1]["result"] = cost.run(cells[-1], Path(), torch.device("cpu"))
    text = cost.section(entries, tmp_path / "picture.png")
    assert ["forward", "256", "250", "250"] in rows_of(text)
    assert ["decode step", "512", "250", "out of memory"] in rows_of(text)
    assert "18 bytes" in text
    for entry in entries:
        entry["result"].pop("cache bytes", None)
    text = cost.section(entries, tmp_path / "picture.png")
    assert "18 bytes" not in text
    assert cost.points_of(entries, "gka", "forward", memory=True) == [(256, 5e6), (512, 5e6)]
    assert_drawn(tmp_path / "picture.png")


def test_experiments_have_all_that_is_needed() -> None:
    for name, module in command.EXPERIMENTS.items():
        experiment: Any = importlib.import_module(module)
        runs = getattr(experiment, "run", None) or experiment.run_until
        assert experiment.SUMMARY and callable(runs) and callable(experiment.section), name
        for size in ("small", "full"):
            cells = experiment.cells(size)
            assert cells and len({json.dumps(cell, sort_keys=True) for cell in cells}) == len(cells)
