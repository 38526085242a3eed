"""The benchmark of context parallelism runs on CPU processes; its check finds rounding alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import run_ranks
from pages import rows_of

from benchmarks.bench_fsdp import fsdp_table
from benchmarks.bench_parallel import parallel_table
from benchmarks.bench_parallel_model import parallel_model_table

SMALL = ("--tokens", "24", "--hidden", "16", "--heads", "2", "--dtype", "float32")


def test_times_and_bytes(tmp_path: Path) -> None:
    output = tmp_path / "parallel.json"
    run_ranks("-m", "benchmarks.bench_parallel", *SMALL, "--repeats", "1", "--output", str(output))
    result = json.loads(output.read_text())
    assert result["command"].startswith("torchrun --nproc_per_node 2 -m benchmarks.bench_parallel --tokens 24")
    rows = result["rows"]
    assert [(row["part"], row["layout"], row["ranks"]) for row in rows[::2]] == [
        (part, layout, ranks)
        for part in ("op", "sums", "exchange", "layer")
        for layout, ranks in (("contiguous", 2), ("zigzag", 2), ("one rank", 1))
        if (part, layout) != ("exchange", "one rank")
    ]
    assert all(row["seconds"]["median"] > 0 for row in rows)
    # One piece: the sum of g and two states of 8 x 8 for each of 2 heads, in float32.
    piece = 2 * (1 + 2 * 64) * 4
    assert [row.get("bytes") for row in rows[:6]] == [
        [piece],
        [piece] * 2,
        [2 * piece],
        [2 * piece] * 2,
        None,
        None,
    ]
    # In the layer also the last 3 inputs of three convolutions of 16 channels.
    assert [row.get("bytes") for row in rows[6:12]] == [[], [], [], [], None, None]
    assert [row["bytes"] for row in rows[12:16]] == [[piece], [piece] * 2, [2 * piece], [2 * piece] * 2]
    assert [row["bytes"] for row in rows[16:18]] == [[3 * 48 * 4, piece], [3 * 48 * 4, piece, piece, 3 * 48 * 4]]
    table = rows_of(parallel_table(result))
    assert len(table) == 2 + len(rows) and table[2][1:4] == ["forward", "contiguous", "2"]
    assert table[6][2:4] == ["whole", "1"] and table[6][5] == "1.00" and float(table[2][5]) > 0


def test_results_are_compared() -> None:
    printed = run_ranks("-m", "benchmarks.bench_parallel", *SMALL, "--check").stdout
    lines = [line.split() for line in printed.splitlines() if line.startswith(("op", "layer"))]
    assert {line[2] for line in lines if line[:2] == ["op", "zigzag"]} == {
        "o",
        "dq",
        "dk",
        "dv",
        "dg",
        "dalpha",
        "dbeta",
    }
    assert sum(line[:3] == ["layer", "contiguous", "parameter"] for line in lines) > 10
    assert all(float(line[-1]) < 1e-3 for line in lines)


def test_steps_of_models(tmp_path: Path) -> None:
    """Ranks that share a row and one rank alone have the same loss."""
    output = tmp_path / "model.json"
    sizes = ("--hidden", "16", "--heads", "2", "--head-dim", "8", "--layers", "2", "--vocabulary", "50")
    small = ("--tokens", "24", "--repeats", "1", "--output", str(output))
    run_ranks("-m", "benchmarks.bench_parallel_model", *sizes, *small)
    result = json.loads(output.read_text())
    rows = result["rows"]
    assert [(row["mixer"], row["ranks"]) for row in rows] == [
        ("gka", 2), ("gka", 1), ("attention", 2), ("attention", 1),
    ]  # fmt: skip
    assert all(row["tokens per second"] == 24 / row["seconds"]["median"] for row in rows)
    for shared, alone in zip(rows[::2], rows[1::2], strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    table = rows_of(parallel_model_table(result))
    assert [row[:3] for row in table[2:]] == [
        ["24", "gka", "2"], ["24", "gka", "1"], ["24", "attention", "2"], ["24", "attention", "1"],
    ]  # fmt: skip


def test_steps_of_sharded_models(tmp_path: Path) -> None:
    """Every process has rows of its own."""
    output = tmp_path / "fsdp.json"
    sizes = ("--hidden", "32", "--heads", "2", "--head-dim", "16", "--layers", "2", "--vocabulary", "50")
    small = ("--recipes", "440m", "--length", "24", "--batch", "1", "--repeats", "1", "--output", str(output))
    run_ranks("-m", "benchmarks.bench_fsdp", *sizes, *small, "--checkpointing")
    rows = json.loads(output.read_text())["rows"]
    assert [(row["mixer"], row["ranks"], row["checkpointing"]) for row in rows] == [
        ("gka", 2, True), ("attention", 2, True),
    ]  # fmt: skip
    assert all(row["tokens per second"] == 2 * 24 / row["seconds"]["median"] for row in rows)
    assert all(3.5 < row["loss"] < 4.5 for row in rows), "the logarithm of 50 is 3.9"
    table = rows_of(fsdp_table(json.loads(output.read_text())))
    assert [row[1:6] for row in table[2:]] == [
        ["gka", "2", "1 x 24", "yes", "no"], ["attention", "2", "1 x 24", "yes", "no"],
    ]  # fmt: skip
