"""The table and the picture of `python -m experiments mqar`.

A row of the table is a mixer at a model dim, with the learning rate of the best mean accuracy over the seeds.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

from .mqar_options import ALL_MIXERS, MQAROptions

_INK = "#333333"
STYLE = {
    "gka": ("GKA", "#c8553d", "o"),
    "gla": ("GLA (no solve)", "#3d7ea6", "s"),
    "attention": ("softmax attention", "#8a8a8a", "^"),
    "gdn": ("Gated DeltaNet", "#2a9d8f", "D"),
    "mamba2": ("Mamba-2", "#b8860b", "v"),
    "mesa": ("MesaNet", "#7b4f9d", "X"),
}


def summarise(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table, by mixer and dim.

    Args:
        cells: entries of the results file, as `train_cell` returns them.

    Returns:
        For each mixer and dim: `learning_rate` (the best one), `accuracy` (mean over its seeds), `lowest`,
        `highest`, `seeds` (how many), `learning_rates` (how many were tried), `steps` (mean), `state_size`,
        `parameters`, and `cpu_seconds` of a training (mean).
    """
    groups: dict[tuple[str, int], dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        groups[cell["mixer"], cell["dim"]][cell["learning_rate"]].append(cell)
    rows = []
    for (mixer, dim), rates in sorted(groups.items(), key=lambda item: (ALL_MIXERS.index(item[0][0]), item[0][1])):
        rate, runs = max(rates.items(), key=lambda item: (_mean(item[1], "accuracy"), -item[0]))
        accuracies = [run["accuracy"] for run in runs]
        rows.append(
            {
                "mixer": mixer,
                "dim": dim,
                "learning_rate": rate,
                "accuracy": round(_mean(runs, "accuracy"), 5),
                "lowest": min(accuracies),
                "highest": max(accuracies),
                "seeds": len(runs),
                "learning_rates": len(rates),
                "steps": round(_mean(runs, "steps")),
                "state_size": runs[0]["state_size"],
                "parameters": runs[0]["parameters"],
                "cpu_seconds": round(_mean(runs, "cpu_seconds"), 1),
            }
        )
    return rows


def format_table(results: dict[str, Any], options: MQAROptions) -> str:
    """The table of results as text, below a line that describes the task."""
    header = ("mixer", "dim", "state/layer", "best lr", "accuracy", "range", "seeds", "steps", "CPU s")
    lines = [header]
    for row in results["table"]:
        lines.append(
            (
                row["mixer"],
                str(row["dim"]),
                f"{row['state_size']:,}",
                f"{row['learning_rate']:g}",
                f"{row['accuracy']:.3f}",
                f"{row['lowest']:.3f} .. {row['highest']:.3f}",
                str(row["seeds"]),
                f"{row['steps']:,}",
                f"{row['cpu_seconds']:.0f}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rows = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    ]
    total = sum(run["cpu_seconds"] for run in results["runs"])
    wall = sum(run["seconds"] for run in results["runs"])
    return "\n".join(
        [
            f"MQAR: {task_line(options)}",
            "",
            rows[0],
            "  ".join("-" * width for width in widths),
            *rows[1:],
            "",
            "accuracy: mean over the seeds, on new sequences; state/layer: numbers in the state of a sequence",
            f"time: {total / 60:.1f} CPU minutes, {wall / 60:.1f} minutes by the clock",
        ]
    )


def task_line(options: MQAROptions) -> str:
    """A description of the task in one line."""
    return (
        f"{options.num_pairs} pairs in {options.seq_len} tokens, vocabulary {options.vocab_size:,}, "
        f"{options.heads} {'head' if options.heads == 1 else 'heads'} of "
        f"{f'dim / {options.heads}' if options.head_dim is None else options.head_dim}, two layers"
    )


def plot(path: Path, results: dict[str, Any], options: MQAROptions) -> None:
    """Draw accuracy against dim, and against steps at the dim where mixers differ most; save as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_dims(left, results["table"])
    dim = _telling_dim(results["table"])
    _draw_steps(right, results, dim)
    left.set_xlabel("model dim", color=_INK)
    right.set_xlabel(f"training step, model dim {dim}", color=_INK)
    left.set_ylabel("accuracy on held-out sequences", color=_INK)
    for axes in (left, right):
        axes.set_ylim(-0.03, 1.04)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK)
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles, labels, frameon=False, loc="best")
    title = f"Multi-query associative recall: {task_line(options)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK)
    figure.savefig(path, format="png")


def _draw_dims(axes: Any, rows: list[dict[str, Any]]) -> None:
    dims = sorted({row["dim"] for row in rows})
    for mixer, group in itertools.groupby(rows, key=lambda row: row["mixer"]):
        points = list(group)
        name, color, marker = STYLE[mixer]
        mean = [row["accuracy"] for row in points]
        below = [row["accuracy"] - row["lowest"] for row in points]
        above = [row["highest"] - row["accuracy"] for row in points]
        axes.errorbar(
            [dims.index(row["dim"]) for row in points],
            mean,
            yerr=[below, above],
            label=name,
            color=color,
            marker=marker,
            markersize=7,
            linewidth=2,
            capsize=4,
            elinewidth=1.2,
        )
    axes.set_xticks(range(len(dims)), [str(dim) for dim in dims])
    axes.set_xlim(-0.4, len(dims) - 0.6)


def _draw_steps(axes: Any, results: dict[str, Any], dim: int) -> None:
    best = {row["mixer"]: row["learning_rate"] for row in results["table"] if row["dim"] == dim}
    for cell in results["cells"]:
        mixer = cell["mixer"]
        if cell["dim"] != dim or cell["learning_rate"] != best[mixer]:
            continue
        _, color, marker = STYLE[mixer]
        steps, accuracy, _ = zip(*cell["history"], strict=True)
        axes.plot((0, *steps), (0.0, *accuracy), color=color, linewidth=1.6, alpha=0.85)
        axes.plot(steps[-1], accuracy[-1], color=color, marker=marker, markersize=6)
    axes.set_xlim(left=0)


def _telling_dim(rows: list[dict[str, Any]]) -> int:
    """The dim with the widest range of accuracies between mixers; the largest such dim if there are several."""
    by_dim: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        by_dim[row["dim"]].append(row["accuracy"])
    return max(by_dim, key=lambda dim: (max(by_dim[dim]) - min(by_dim[dim]), dim))


def _mean(runs: list[dict[str, Any]], name: str) -> float:
    return sum(run[name] for run in runs) / len(runs)
