"""The benchmarks run, and the tables show what they measured."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_forked
from pages import assert_drawn, rows_of
from tiny_run import run_process, train, write_texts
from transformers import CompileConfig

from benchmarks import (
    bench_layer,
    bench_model,
    bench_pool,
    bench_serve,
    bench_steps,
    common,
    generation,
    stages,
    table,
)
from benchmarks.bench_length import tokens
from experiments.evidence import mfu
from gka.cli import machine

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    """What `python -m ARGUMENTS` prints."""
    return run_forked("-m", *arguments, folder=ROOT).stdout


def test_bench_ops(tmp_path: Path) -> None:
    output = tmp_path / "ops.json"
    sizes = ("--shortest", "64", "--longest", "128", "--heads", "1", "--dim", "8", "--repeats", "1")
    run("benchmarks.bench_ops", "--only", "growth", *sizes, "--output", str(output))
    result = json.loads(output.read_text())
    assert [row["T"] for row in result["rows"]] == [64, 64, 128, 128]
    assert result["command"].startswith("python -m benchmarks.bench_ops --only growth")
    assert all(row["seconds"]["median"] > 0 for row in result["rows"])


def test_bench_steps(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", files=6, lines=3)
    assert train(tmp_path / "run", texts, max_steps=1, save_every=1, eval_every=1) == 0
    solver_steps, sizes = [[31], [16, 16], [2]], argparse.Namespace(prompt=8, repeats=1)
    costs = list(bench_steps.accuracy(str(tmp_path / "run"), 40, 200, solver_steps))
    errors = [row["error of o, float32"] for row in costs]
    assert errors[0] < 1e-3 and errors[1] < 1e-3 < 1e-2 < errors[2]
    rows = [*costs, *bench_steps.times(sizes, solver_steps)]
    common.write_result("steps", rows, "a command", tmp_path / "steps.json")
    assert "| 16,16 |" in table.steps(json.loads((tmp_path / "steps.json").read_text()))


def test_bench_serve(tmp_path: Path) -> None:
    output = tmp_path / "serve.json"
    sizes = ("--hidden-size", "32", "--layers", "1", "--heads", "2", "--prompt", "8", "--tokens", "8")
    run("benchmarks.bench_serve", "--engines", "transformers", *sizes, "--requests", "2", "--output", str(output))
    result = json.loads(output.read_text())
    (row,) = result["rows"]
    assert 0 < row["first text"]["least"] <= row["end"]["least"]
    assert row["tokens per second"]["largest"] <= 2 * 8 / row["end"]["least"], "two requests of eight tokens"
    assert rows_of(bench_serve.serve_table(result))[-1][:2] == ["2", "transformers"]
    with pytest.raises(SystemExit):
        bench_serve.parse(["--engines", "transformers", "--", "--enforce-eager"])


def test_bench_ops_at_the_papers_width(tmp_path: Path) -> None:
    output = tmp_path / "wide.json"
    small = ("--shapes", "2,70,1", "--repeats", "1", "--without", "gka (31,)")
    run("benchmarks.bench_ops", "--only", "wide", *small, "--output", str(output))
    result = json.loads(output.read_text())
    ops = ["gka (16, 16)", "gka (16, 8)", "gka cg (10, 10)", "SDPA, causal"]
    assert [row["op"] for row in result["rows"]] == 2 * ops
    assert all(row["seconds"]["median"] > 0 and row["first call"] > 0 for row in result["rows"])
    cells = ["B 2, T 70, H 1", "forward+backward", "gka (16, 16)"]
    assert cells in [row[:3] for row in rows_of(table.ops(result))]


def test_the_picture_of_the_stages(tmp_path: Path) -> None:
    """Every kernel has a floor, and those of the whole op are what a token-head must move and multiply."""
    size = {"B": 1, "T": 131072, "H": 16, "D": 128}
    floors = {name: stages.floor(name, **size) for name in stages.KERNELS}
    assert all(value > 0 for value in floors.values())
    assert floors["solve_chunks"] == pytest.approx(68.6 * 65536 * 131072 * 16 / 790e12)
    assert floors["query_gradients"] == pytest.approx(1792 * 131072 * 16 / 4.2e12)
    assert stages.floor("query_gradients", **size, gpu="NVIDIA H100") == pytest.approx(1792 * 131072 * 16 / 3.0e12)
    row = {"part": "wide", "op": "gka (16, 16)", "what": "forward+backward", **size, "V": 128}
    row |= {"kernels": {name: 2 * value for name, value in floors.items()} | {"rest": 0.0}}
    path = tmp_path / "wide.json"
    path.write_text(json.dumps({"rows": [row], "machine": {"gpu": "a GPU", "processor": "none"}}))
    picture = stages.plot(path)
    assert picture is not None
    assert_drawn(picture)
    path.write_text(json.dumps({"rows": [], "machine": {"gpu": None, "processor": "none"}}))
    assert stages.plot(path) is None


def test_bench_decode(tmp_path: Path) -> None:
    output = tmp_path / "decode.json"
    sizes = ("--batches", "1", "3", "--heads", "2", "--dim", "8", "--repeats", "1")
    printed = run("benchmarks.bench_decode", *sizes, "--output", str(output))
    assert "not measured" in printed
    result = json.loads(output.read_text())
    assert {(row["B"], row["states"]) for row in result["rows"]} == {
        (B, states) for B in (1, 3) for states in ("float32", "bfloat16")
    }
    assert all(row["seconds"]["median"] > 0 for row in result["rows"])
    page = table.decode(result)
    head, *rows = rows_of(page)
    assert {"kernel (16, 16)", "PyTorch (16, 16)"} <= set(head) and ["3", "bfloat16"] in [row[:2] for row in rows]


def test_bench_pool(tmp_path: Path) -> None:
    output = tmp_path / "pool.json"
    sizes = ("--requests", "1", "3", "--rows", "4", "--heads", "2", "--dim", "8", "--repeats", "1")
    run("benchmarks.bench_pool", *sizes, "--output", str(output))
    result = json.loads(output.read_text())
    ways = ["copy", "contiguous", "pool", "copied rows"]
    assert [(row["states"], row["B"], row["what"]) for row in result["rows"]] == [
        (states, B, way) for states in ("float32", "bfloat16") for B in (1, 3) for way in ways
    ]
    assert all(row["seconds"]["median"] > 0 for row in result["rows"])
    assert result["rows"][4]["bytes"] == 2 * 2 * 4 * 3 * 2 * 8 * 8  # read and written, two states, 4 bytes
    for row, seconds in zip(result["rows"], (1e-3, 2e-3, 3e-3, 4e-3), strict=False):
        row["seconds"]["median"] = seconds
    head, _, first, *_ = rows_of(table.pool_table(result))
    assert head[:2] == ["states", "requests"] and head[3:] == [*ways, "pool / contiguous", "pool / copy"]
    assert first == ["float32", "1", "0", "1.000", "2.000", "3.000", "4.000", "1.50", "3.00"]


def test_the_rows_of_a_step_are_distinct() -> None:
    steps = bench_pool.steps_of_requests(5, 13, 3, torch.device("cpu"))
    assert [len(set(step.tolist())) for step in steps] == [5, 5, 5]
    assert len(set(torch.cat(steps[:2]).tolist())) == 10 and all(0 <= int(x) < 13 for x in torch.cat(steps))


def test_bench_decode_with_a_model(tmp_path: Path) -> None:
    output, recipe = tmp_path / "generation.json", tmp_path / "tiny.yaml"
    recipe.write_text("hidden_size: 16\nintermediate_size: 16\nlayers: 4\nheads: 2\nhead_dim: 8\n")
    sizes = ("--batches", "1", "3", "--tokens", "3", "--repeats", "1", "--eager")
    run("benchmarks.bench_decode", "--model", str(recipe), *sizes, "--output", str(output))
    result = json.loads(output.read_text())
    assert [(row["model"], row["B"], row["dtype"]) for row in result["rows"]] == [
        (m, B, "float32") for m in ("pure", "hybrid") for B in (1, 3)
    ]
    assert all(row["tokens per second"] > 0 and row["equal"] == 1.0 for row in result["rows"])
    graphs = [row | {"way": "graph", "tokens per second": 1234.4, "equal": 0.75} for row in result["rows"]]
    head, *rows = rows_of(table.generation(result | {"rows": [*result["rows"], *graphs]}))
    assert head[-2:] == ["graph, tokens/s", "same tokens"] and rows[3][-2:] == ["1,234", "75.0%"]


def test_bench_decode_with_a_compiled_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(generation, "CompileConfig", lambda: CompileConfig(backend=backend, mode=None))
    (recipe := tmp_path / "tiny.yaml").write_text("hidden_size: 16\nlayers: 1\nheads: 2\nhead_dim: 8\n")
    sizes = dict(device=torch.device("cpu"), model=recipe, batches=[2], tokens=4, repeats=1, eager=False)
    rows = list(generation.bench(argparse.Namespace(**sizes)))
    assert [(row["way"], row["equal"]) for row in rows] == [("eager", 1.0), ("compiled", 1.0)] and graphs
    assert "hybrid:" not in table.generation({"rows": rows})


def test_bench_length(tmp_path: Path) -> None:
    output = tmp_path / "length.json"
    sizes = ("--least-tokens", "64", "--most-tokens", "256", "--most-tokens-backward", "128", "--repeats", "1")
    run("benchmarks.bench_ops", "--only", "length", *sizes, "--output", str(output))
    result = json.loads(output.read_text())
    assert result["benchmark"] == "length"
    assert [(row["T"], row["what"]) for row in result["rows"][::2]] == [
        *((T, what) for T in (64, 128) for what in ("forward", "forward+backward")),
        (256, "forward"),
    ]
    assert {row["op"] for row in result["rows"]} == {"gka (16, 16)", "SDPA, causal"}
    assert all(row["seconds"]["median"] > 0 for row in result["rows"])
    assert_drawn(output.with_suffix(".png"))
    assert "![time against tokens](results/length.png)" in table.length({**result, "file": output.name})


def test_bench_length_stops_at_its_limit(tmp_path: Path) -> None:
    output = tmp_path / "length.json"
    sizes = ("--least-tokens", "64", "--most-tokens", "128", "--most-tokens-backward", "0", "--repeats", "1")
    run("benchmarks.bench_ops", "--only", "length", *sizes, "--limit", "0", "--output", str(output))
    result = json.loads(output.read_text())
    assert [row["seconds"] is None for row in result["rows"]] == [False, False, True, True]
    measured = {row["op"]: row["seconds"]["median"] for row in result["rows"][:2]}
    for row in result["rows"][2:]:
        assert row["note"].startswith(f"not run: {measured[row['op']]:.1f} s at a smaller length")
    assert "| 128 | not run | not run |" in table.length({**result, "file": output.name})
    assert_drawn(output.with_suffix(".png"))


def test_lengths_are_written_short() -> None:
    assert [tokens(T) for T in (64, 2048, 131072, 2**20, 1500)] == ["64", "2K", "128K", "1M", "1500"]


MODEL = (
    "--layers", "1", "--hidden", "32", "--heads", "2", "--head-dim", "16", "--vocabulary", "50", "--batch", "2",
    "--length", "33", "--repeats", "2", "--warm-up", "0",
)  # fmt: skip


def test_bench_model(tmp_path: Path) -> None:
    output = tmp_path / "model.json"
    more = ("--loss-chunk", "16", "--peak-tflops", "0.5", "--output", str(output))
    printed = run("benchmarks.bench_model", *MODEL, *more)
    assert "Gated DeltaNet" in printed and "not measured, flash-linear-attention is not installed" in printed
    result = json.loads(output.read_text())
    ours, delta_net, attention = result["rows"]
    assert [row["mixer"] for row in result["rows"]] == ["gka", "Gated DeltaNet", "attention"]
    for row in (ours, attention):
        assert row["tokens per second"] == pytest.approx(2 * 33 / row["seconds"]["median"])
        assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"]["median"] / 0.5e12)
    assert delta_net["seconds"] is None and "parameters" not in delta_net
    linear = 32 * 50 + 4 * 32 * 32 + 3 * 32 * 64  # head, projections, feed-forward
    assert attention["flops"] == 3 * 2 * 33 * (2 * linear + 2 * 33 * 2 * 16)
    page = rows_of(table.SECTIONS["model"][1](result))
    assert page[0][:4] == ["mode", "mixer", "million parameters", "tokens/s"]
    assert ["eager", "Gated DeltaNet", "", "not run"] in [row[:4] for row in page]


def test_bench_model_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode that does not fit leaves a note, and the next one is measured."""
    monkeypatch.setattr(bench_model, "measure", lambda model, options, mode: full() if mode == "eager" else done)
    done = {"seconds": {"median": 1.0, "least": 1.0, "largest": 1.0}, "first call": 0.1} | dict.fromkeys(
        ("tokens per second", "host seconds", "gpu seconds", "peak bytes"), 1.0
    )

    def full() -> None:
        raise torch.OutOfMemoryError("no memory")

    options = bench_model.parse([*MODEL, "--mixers", "gka", "--modes", "eager", "compiled"])
    rows = list(bench_model.bench(options))
    assert rows[0]["note"] == "out of memory" and rows[1]["seconds"]["median"] == 1.0
    assert "gka, eager: out of memory." in bench_model.model_table({"rows": rows})


def test_peaks_of_cards() -> None:
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA L4")
    assert [mfu.peak_of(name) for name in names] == [989e12, 756e12, 312e12, None]


def test_results_of_models_stand_beside_each_other() -> None:
    """Of another batch size, that is; the same sizes are replaced."""
    row = {"part": "model", "B": 8, "T": 2048, "layers": 28, "loss chunk": None, "mode": "eager", "mixer": "gka"}
    first, second = ({"rows": [{**row, "B": B}]} for B in (8, 16))
    assert table._what_was_run(first) != table._what_was_run(second)
    assert table._what_was_run(first) == table._what_was_run({"rows": [{**row, "seconds": None}]})


def test_bench_layer(tmp_path: Path) -> None:
    output = tmp_path / "layer.json"
    sizes = ("--shapes", "2,33", "--hidden", "48", "--heads", "2", "--head-dim", "24", "--repeats", "1")
    printed = run("benchmarks.bench_layer", *sizes, "--autocast", "--output", str(output))
    assert "Gated DeltaNet is not measured" in printed
    result = json.loads(output.read_text())
    assert [row["layer"] for row in result["rows"]] == 2 * ["gka (16, 16)", "gka (16, 8)", "SDPA"]
    assert all(row["seconds"]["median"] > 0 and row["first call"] > 0 for row in result["rows"])
    assert "| B 2, T 33 | forward+backward | gka (16, 16) |" in table.layer(result)
    for row in result["rows"]:
        row |= {"shares": {"op": 0.5, "rest": 0.25}, "note": "a note", "host seconds": 0.0025}
    assert "| first call, s | host ms |" in table.layer(result) and " 2.50 |" in table.layer(result)
    written = table.layer(result)
    assert "| what | layer | op | rest |" in written and "SDPA: a note." in written


def test_bench_norm(tmp_path: Path) -> None:
    output = tmp_path / "norm.json"
    sizes = ("--shapes", "30,24", "--calls", "2", "--repeats", "1")
    printed = run("benchmarks.bench_norm", *sizes, "--output", str(output))
    assert "FusedRMSNormGated is not measured" in printed
    result = json.loads(output.read_text())
    assert [(row["what"], row["norm"]) for row in result["rows"]] == [
        ("forward", "FusedRMSNormGated"),
        ("forward", "PyTorch"),
        ("forward", "sum"),
        ("forward+backward", "FusedRMSNormGated"),
        ("forward+backward", "PyTorch"),
    ]
    assert all(row["seconds"]["median"] > 0 for row in result["rows"] if row["norm"] != "FusedRMSNormGated")
    for row in result["rows"][1:3]:
        row["ratio"] = 0.5
    written = table.norm(result)
    assert "| 30 x 24 | bfloat16 | forward | FusedRMSNormGated | not run |" in written and "| 0.50 |" in written
    assert "FusedRMSNormGated: flash-linear-attention is not installed." in written


def test_parts_of_the_layer() -> None:
    pytest.importorskip("triton")
    names = {
        "solve_chunks": "op",
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT": "matrix products",
        "convolve_backward": "convolution",
        "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel_generic": "convolution",
        "gated_norm_backward": "norm",
        "vectorized_layer_norm_kernel": "norm",
        "void at::native::vectorized_elementwise_kernel<4>": "rest",
    }
    ours = bench_layer.our_kernels()
    assert {name: bench_layer.part_of(name, ours) for name in names} == names


def test_results_say_their_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GKA_COMMIT", "abc1234")
    path = common.write_result("anything", [], "a command", tmp_path / "result.json")
    assert json.loads(path.read_text())["commit"] == "abc1234"
    monkeypatch.delenv("GKA_COMMIT")
    assert len(machine.describe_commit()) >= 7
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))  # no checkout
    assert machine.describe_commit() == "not a git checkout"
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)  # that of something else
    assert machine.describe_commit() == "not a git checkout"


def test_results_of_different_parts_stand_beside_each_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    row = {"what": "forward", "T": 64, "H": 1, "D": 8, "V": 8, "dtype": "float32", "seconds": {"median": 1.0}}
    growth = {**row, "part": "growth", "steps": [31], "ratio to half T": None}
    peer = {**row, "part": "peer", "op": "gka", "ratio": 1.0}
    for name, rows in (("a", [growth]), ("b", [peer]), ("c", [growth])):
        common.write_result("ops", rows, f"command {name}", tmp_path / f"{name}.json")
    written = table.page()
    assert "command b" in written and "command c" in written and "command a" not in written


def test_memory_stays_within_three_times_what_must_be_held() -> None:
    """Forward + backward at T = 4096: no copy per iterate, none per pair of tokens."""
    sizes = ("4096", "8", "64", "float32")
    done = run_process("--measure-memory", *sizes, launcher=("-m", "benchmarks.bench_ops"), cwd=ROOT)
    measured = json.loads(done.stdout)
    assert measured["peak bytes"] > measured["held bytes"]["inputs"]
    assert measured["ratio"] < 3
