"""Count the outcomes of killed saves and of corrupted configurations.

    python -m benchmarks.bench_reliability

The cases come from tests/training/test_interrupted_saves.py and tests/hf/test_bad_checkpoints.py. This file also
makes the tables of docs/reliability.md; `python -m benchmarks.table` writes them to the page. The table of long
decoding uses the result of benchmarks/bench_long_decode.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import write_result
from experiments.evidence.table import markdown_table
from gka.cli.quiet import quiet

TESTS = Path(__file__).parent.parent / "tests"


def corruptions() -> dict[str, int]:
    """Outcomes of the 64 corrupted values: how many are refused, how many give a working model."""
    from published_helpers import published_config, write_folder
    from test_bad_checkpoints import FULL, VOCAB, corruptions

    from gka import GKAForCausalLM

    found: Counter[str] = Counter()
    config = published_config("*-GKA-SWA", FULL)
    ids = torch.randint(3, VOCAB, (1, 7), generator=torch.Generator().manual_seed(0))
    for table, key, value in corruptions():
        with tempfile.TemporaryDirectory() as name:
            folder = write_folder(Path(name), config, shards=1)
            spoilt = copy.deepcopy(config)
            (spoilt[table] if table else spoilt)[key] = value
            (folder / "config.json").write_text(json.dumps(spoilt))
            try:
                model = GKAForCausalLM.from_pretrained(folder)
            except ValueError:
                found["refused, the error names it"] += 1
                continue
            works = bool(torch.isfinite(model(ids).logits).all())
            found["a model that works" if works else "a model that gives NaN"] += 1
    return dict(found)


def rows() -> Iterator[dict[str, Any]]:
    """One row per kind of save, and one row for the corruptions."""
    from test_interrupted_saves import figures

    for save, outcomes in figures().items():
        yield {"part": "saves", "save": save, "points": sum(outcomes.values()), "outcomes": dict(outcomes)}
    yield {"part": "corruptions", "outcomes": corruptions()}


def made_by(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("python", "torch", "transformers"))
    return f"`{result['command']}`, {result['machine']['processor']}, one core, {result['date']}, {versions}."


def saves_table(result: dict[str, Any]) -> str:
    """A table of the outcomes of killed saves, from a result of this benchmark."""
    kinds = ("nothing", "old", "old, beside", "new", "whole", "error", "mixed", "silent")
    table = []
    for row in result["rows"]:
        if row["part"] == "saves":
            outcomes = ", ".join(f"{kind}: {row['outcomes'][kind]}" for kind in kinds if kind in row["outcomes"])
            table.append([row["save"], str(row["points"]), outcomes])
    return f"{made_by(result)}\n\n{markdown_table(['save', 'kills', 'what is there afterwards'], table)}"


def corruptions_table(result: dict[str, Any]) -> str:
    """A table of the outcomes of corrupted values, from a result of this benchmark."""
    outcomes = next(row["outcomes"] for row in result["rows"] if row["part"] == "corruptions")
    return markdown_table(["of 64 corrupted values", ""], [[kind, str(count)] for kind, count in outcomes.items()])


def decode_table(result: dict[str, Any]) -> str:
    """Tables of long decoding, one row per gate, from a result of bench_long_decode."""
    by_states: dict[str, list[list[str]]] = {"float32": [], "bfloat16": []}
    layer = []
    for row in result["rows"]:
        beside = row["beside a prefill of the window"]
        if row["part"] == "layer":
            figures = ", ".join(f"{name} {value:.1e}" for name, value in beside.items())
            layer.append([str(row["gate"]), figures])
            continue
        marks = row["marks"]
        worst = max(max(mark["error"].values()) for mark in marks)
        by_states[row["states"]].append(
            [
                str(row["gate"]),
                f"{max(mark['asymmetry'] for mark in marks):.0e}",
                f"{min(mark['least'] for mark in marks):.0e}",
                f"{worst:.1e}",
                f"{row['window']:,}",
                f"{beside['o']:.1e}",
                f"{max(beside['S_kk'], beside['S_kv']):.1e}",
            ]
        )
    header = ["log-decay g", "asymmetry", "least eigenvalue", "error", "window", "o", "states"]
    tokens = result["rows"][0]["tokens"]
    parts = [f"{tokens:,} tokens per head, D = V = {result['rows'][0]['D']}. {made_by(result)}"]
    parts += [f"{states} states\n\n{markdown_table(header, table)}" for states, table in by_states.items()]
    header = ["head", "relative difference to a prefill of the window"]
    parts.append(f"The layer with its cache\n\n{markdown_table(header, layer)}")
    return "\n\n".join(parts)


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m benchmarks.bench_reliability",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    ).parse_args()
    sys.path[:0] = [str(TESTS), str(TESTS / "hf"), str(TESTS / "training")]
    torch.set_num_threads(1)
    quiet()
    write_result("reliability", rows(), "python -m benchmarks.bench_reliability")


if __name__ == "__main__":
    main()
