"""Shared parts of the benchmarks: timing, peak memory, and result files with machine, versions and command."""

from __future__ import annotations

import datetime
import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from experiments.evidence.timing import seconds
from gka.cli.machine import describe_commit, describe_machine, describe_versions

RESULTS = Path(__file__).parent / "results"


def medians(
    functions: dict[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, dict[str, float]]:
    """Median, smallest and largest seconds of each function; they take turns, after one warm-up call each."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    return {
        name: {"median": statistics.median(values), "least": min(values), "largest": max(values)}
        for name, values in times.items()
    }


def write_result(name: str, rows: Iterable[dict[str, Any]], command: str, output: Path | None = None) -> Path:
    """Write each row at once to benchmarks/results/NAME_MACHINE_DATE.json, and print the path at the end.

    An interrupted run leaves the rows that it has measured. A later run on the same day overwrites the file; use
    `output` to keep both. If the code is not a git checkout, set the environment variable GKA_COMMIT to the
    commit.
    """
    machine = describe_machine()
    label = re.sub(r"[^a-z0-9]+", "-", (machine["gpu"] or "cpu").lower()).strip("-")
    date = datetime.date.today().isoformat()
    path = output or RESULTS / f"{name}_{label}_{date}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "benchmark": name,
        "command": command,
        "commit": describe_commit(),
        "date": date,
        "machine": machine,
        "versions": describe_versions(),
        "rows": [],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    for row in rows:
        content["rows"].append(row)
        path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {path}")
    return path
