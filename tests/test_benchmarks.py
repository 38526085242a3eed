"""The benchmarks run, and the page of results is what the result files say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import table

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=one_thread)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_results_page_is_up_to_date() -> None:
    assert table.PAGE.read_text() == table.page()


def test_bench_ops(tmp_path: Path) -> None:
    output = tmp_path / "ops.json"
    sizes = ("--shortest", "64", "--longest", "128", "--heads", "1", "--dim", "8", "--repeats", "1")
    run("benchmarks.bench_ops", "--only", "growth", *sizes, "--output", str(output))
    result = json.loads(output.read_text())
    assert [row["T"] for row in result["rows"]] == [64, 64, 128, 128]
    assert result["command"].startswith("python -m benchmarks.bench_ops --only growth")
    assert all(row["seconds"]["median"] > 0 for row in result["rows"])


def test_bench_ops_at_the_papers_width(tmp_path: Path) -> None:
    output = tmp_path / "wide.json"
    run("benchmarks.bench_ops", "--only", "wide", "--shapes", "2,70,1", "--repeats", "1", "--output", str(output))
    result = json.loads(output.read_text())
    assert [row["op"] for row in result["rows"]] == 2 * [
        "gka (16, 16)",
        "gka (16, 8)",
        "gka (31,)",
        "SDPA, causal",
    ]
    assert all(row["seconds"]["median"] > 0 and row["first call"] > 0 for row in result["rows"])
    assert "| B 2, T 70, H 1 | forward+backward | gka (16, 16) |" in table.ops(result)


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
    assert "| B | states | floor | kernel (16, 16) | PyTorch (16, 16) |" in page and "| 3 | bfloat16 |" in page


def test_memory_stays_within_three_times_what_must_be_held() -> None:
    """Forward + backward at T = 4096: no copy per iterate, none per pair of tokens."""
    measured = json.loads(run("benchmarks.bench_ops", "--measure-memory", "4096", "8", "64", "float32"))
    assert measured["peak bytes"] > measured["held bytes"]["inputs"]
    assert measured["ratio"] < 3


@pytest.mark.slow
def test_bench_numerics(tmp_path: Path) -> None:
    output = tmp_path / "numerics.json"
    printed = run("benchmarks.bench_numerics", "--tokens", "64", "--output", str(output))
    assert "Chebyshev, nodes, refined" in printed and output.with_suffix(".png").stat().st_size > 10_000
    rows = json.loads(output.read_text())["rows"]
    assert {row["part"] for row in rows} == {"iterations", "recursion", "gradients"}
