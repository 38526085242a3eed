"""Tables of docs/parallel.md from the results of several GPUs, and its picture of speed against length.

    python -m benchmarks.parallel_pages     # draws docs/images/parallel.png; benchmarks.table makes the tables

The results of one benchmark, with other numbers of GPUs or other lengths, are several files; all of the newest
day count. Of two rows for the same case that of the last file counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.bench_fsdp import sharding_table
from benchmarks.bench_parallel_model import speed_table
from benchmarks.common import RESULTS
from experiments.evidence.table import markdown_table

Row = dict[str, Any]
Result = dict[str, Any]
PICTURE = RESULTS.parent.parent / "docs" / "images" / "parallel.png"
MIXERS = {
    "gka": ("GKA", "#2f6f9f"),
    "attention": ("softmax attention, keys and values gathered", "#c8553d"),
    "qwen3": ("transformers' Qwen3, PyTorch's ring attention", "#9a9a9a"),
}


def of_newest_day(results: Sequence[Result]) -> list[Result]:
    """The results of the newest day."""
    return [result for result in results if result["date"] == results[-1]["date"]]


def rows_of(results: Sequence[Result]) -> list[Row]:
    """The rows of the results of the newest day."""
    return [row for result in of_newest_day(results) for row in result["rows"]]


def last_rows(results: Sequence[Result]) -> list[Row]:
    """Of the rows of models the last for each mixer, length, number of GPUs and kind of checkpointing."""
    keys = ("mixer", "T", "ranks", "checkpointing")
    last = {tuple(row[key] for key in keys): row for row in rows_of(results)}
    return [row for row in last.values() if row["seconds"] is not None]


def sources(results: Sequence[Result]) -> str:
    """Machine, day, and the files with their commands."""
    newest = of_newest_day(results)
    files = ", ".join(f"[`{r['command']}`](../benchmarks/results/{r['file']})" for r in newest)
    return f"{newest[-1]['machine']['gpu'] or 'CPU'}, {newest[-1]['date']}: {files}."


def shared_sequences_table(results: Sequence[Result]) -> str:
    """Milliseconds of op and layer by the number of GPUs, and how much faster than one GPU of the same run."""
    runs = of_newest_day(results)
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for run in sorted(runs, key=lambda run: max(row["ranks"] for row in run["rows"])):
        rows = [row for row in run["rows"] if row["layout"] in ("contiguous", "one rank")]
        alone = {(row["part"], row["what"]): row["seconds"]["median"] for row in rows if row["ranks"] == 1}
        for row in rows:
            key, median = (row["part"], row["what"]), row["seconds"]["median"]
            faster = "" if row["ranks"] == 1 or key not in alone else f" ({alone[key] / median:.2f})"
            cells.setdefault(key, {})[row["ranks"]] = f"{median * 1e3:.2f}{faster}"
    ranks = sorted({n for found in cells.values() for n in found})
    table = [[f"{part}, {what}", *(found.get(n, "") for n in ranks)] for (part, what), found in cells.items()]
    header = ["", *(f"{n} GPU{'s' * (n > 1)}, ms" for n in ranks)]
    first = runs[0]["rows"][0]
    shape = f"T {first['T']:,}, {first['H']} heads of {first['D']}, {first['dtype']}; layer: hidden size 2,048"
    told = f"{shape}. In brackets: times faster than one GPU in the same run."
    return f"{told}\n\n{markdown_table(header, table)}\n\n{sources(results)}"


def models_table(results: Sequence[Result]) -> str:
    """Tokens per second of training by length, mixer, number of GPUs and checkpointing."""
    order = list(MIXERS)
    rows = sorted(
        last_rows(results),
        key=lambda row: (row["T"], order.index(row["mixer"]), row["ranks"], not row["checkpointing"]),
    )
    names = {mixer: name for mixer, (name, _) in MIXERS.items()}
    return f"{speed_table(rows, names)}\n\n{sources(results)}"


def sharded_models_table(results: Sequence[Result]) -> str:
    """Tokens per second, MFU and peak of models that FSDP shards."""
    return f"{sharding_table(rows_of(results))}\n\n{sources(results)}"


def draw_speed(results: Sequence[Result]) -> Figure:
    """Tokens per second against the length of the sequence, of all GPUs with blocks checkpointed."""
    rows = [row for row in last_rows(results) if row["checkpointing"]]
    most = max(row["ranks"] for row in rows)
    figure = Figure(figsize=(7.2, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for mixer, (name, color) in MIXERS.items():
        line = sorted(
            (row["T"], row["tokens per second"]) for row in rows if (row["mixer"], row["ranks"]) == (mixer, most)
        )
        if line:
            axes.plot(*zip(*line, strict=True), "o-", color=color, label=name, markersize=4)
    lengths = sorted({row["T"] for row in rows if row["ranks"] == most})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{T // 1024}K" if T < 2**20 else f"{T // 2**20}M" for T in lengths])
    axes.minorticks_off()
    ticks = [n * 10**k for k in (4, 5) for n in (1, 2, 5)]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("tokens of the sequence")
    axes.set_ylabel(f"tokens per second, {most} GPUs")
    axes.set_title(f"Training steps of 440M parameters, {results[-1]['machine']['gpu']}", fontsize=10, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


def results_of(benchmark: str) -> list[Result]:
    """The committed results of a benchmark, from old to new."""
    files = sorted(RESULTS.glob(f"{benchmark}_*.json"))
    results = [json.loads(path.read_text()) | {"file": path.name} for path in files]
    return sorted((r for r in results if r["benchmark"] == benchmark), key=lambda r: str(r["date"]))


def main(picture: Path = PICTURE) -> None:
    draw_speed(results_of("parallel_model")).savefig(picture, metadata={"Software": None})
    print(f"written: {picture}")


if __name__ == "__main__":
    main()
