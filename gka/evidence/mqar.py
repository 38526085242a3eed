"""Accuracy on multi-query associative recall against model dim, for all mixers (figure 3a of arXiv 2511.21016).

The grid of the figure: 128 to 1024 tokens with a quarter as many pairs of key and value, model dims 32 to 256; so
at dims up to 128 there are more pairs than dims in the longer sequences. Two layers of two heads, equal parameters
(`skeleton.py`), the same data in the same order, and the same four learning rates for every mixer, of which the
page shows the best mean over the seeds. A training ends early where its test accuracy is above 99%.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..tasks import mqar_run, mqar_train
from ..tasks.mqar_report import STYLE
from .picture import new_panels, save
from .record import Cell
from .skeleton import skeleton
from .table import markdown_table

SUMMARY = "accuracy on multi-query associative recall against model dim"
BY_MACHINE = False
HEADS = 2
Entries = list[dict[str, Any]]
_FULL: dict[str, Any] = dict(vocab_size=8192, examples=65_536, epochs=8, batch_size=256, tests=2048)
_SMALL: dict[str, Any] = dict(vocab_size=256, examples=2_000, epochs=4, batch_size=64, tests=200)


def cells(size: str) -> list[Cell]:
    """Seeds last, so that what is there of an unfinished grid can be shown; small: one short task."""
    if size == "small":
        axes = itertools.product((0,), ((16, 4),), (32,), (1e-2,), mqar_run.ALL_MIXERS)
        rest = _SMALL
    else:
        grid = tuple((T, T // 4) for T in (128, 256, 512, 1024))
        axes = itertools.product(
            (0, 1, 2), grid, (32, 64, 128, 256), (3e-4, 1e-3, 3e-3, 1e-2), mqar_run.ALL_MIXERS
        )
        rest = _FULL
    return [
        {"mixer": mixer, "dim": dim, "seq_len": T, "num_pairs": pairs, "learning_rate": rate, "seed": seed, **rest}
        for seed, (T, pairs), dim, rate, mixer in axes
    ]


def run(cell: Cell, folder: Path, device: torch.device) -> Any:
    """Train a model and test it on sequences it has not seen."""
    options = mqar_run.MQAROptions(
        seq_len=cell["seq_len"],
        num_pairs=cell["num_pairs"],
        vocab_size=cell["vocab_size"],
        train_examples=cell["examples"],
        test_examples=cell["tests"],
        epochs=cell["epochs"],
        batch_size=cell["batch_size"],
        heads=HEADS,
        device="cpu" if device.type == "cpu" else "auto",
    )
    config = skeleton(
        cell["mixer"],
        vocab_size=cell["vocab_size"],
        hidden_size=cell["dim"],
        intermediate_size=2 * cell["dim"],
        num_hidden_layers=mqar_train.LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=cell["seq_len"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    place = mqar_run.Cell(cell["mixer"], cell["dim"], cell["learning_rate"], cell["seed"])
    found = mqar_train.train_cell(options, place, lambda step, accuracy: None, config)
    return {name: found[name] for name in ("accuracy", "loss", "steps", "parameters", "state_size", "history")}


def best(entries: Entries) -> Iterator[dict[str, Any]]:
    """Of each task, dim and mixer the learning rate with the best mean accuracy, and its accuracies by seed.

    Of an unfinished grid, only rates and seeds that all its mixers have there.
    """
    by_place: dict[tuple[Any, ...], dict[str, dict[tuple[float, int], float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for entry in entries:
        cell = entry["cell"]
        place = (cell["seq_len"], cell["num_pairs"], cell["dim"])
        trained = (cell["learning_rate"], cell["seed"])
        by_place[place][cell["mixer"]][trained] = entry["result"]["accuracy"]
    every = {entry["cell"]["mixer"] for entry in entries}
    groups: dict[Any, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for place, mixers in by_place.items():
        shared = set.intersection(*(set(mixers[mixer]) for mixer in every))
        for mixer, (rate, seed) in itertools.product(mixers, sorted(shared)):
            groups[place, mixer][rate].append(mixers[mixer][rate, seed])
    for ((T, pairs, dim), mixer), rates in groups.items():
        rate, accuracies = max(rates.items(), key=lambda item: (statistics.mean(item[1]), -item[0]))
        yield {
            "seq_len": T, "num_pairs": pairs, "dim": dim, "mixer": mixer, "learning_rate": rate,
            "rates": len(rates), "accuracies": accuracies,
        }  # fmt: skip


def section(entries: Entries, picture: Path) -> str:
    """A table with a column per mixer; the picture has a panel per length."""
    found = list(best(entries))
    mixers = [mixer for mixer in mqar_run.ALL_MIXERS if any(row["mixer"] == mixer for row in found)]
    tasks = sorted({(row["seq_len"], row["num_pairs"]) for row in found})
    _draw(found, tasks, mixers, picture)
    rows = []
    for (T, pairs), dim in itertools.product(tasks, sorted({row["dim"] for row in found})):
        at = {
            row["mixer"]: row for row in found if (row["seq_len"], row["num_pairs"], row["dim"]) == (T, pairs, dim)
        }
        if at:
            rows.append([str(T), str(pairs), str(dim), *(_shown(at.get(mixer)) for mixer in mixers)])
    seeds = sorted({len(row["accuracies"]) for row in found})
    rates = sorted({row["rates"] for row in found})
    return "\n\n".join(
        (
            "Accuracy in percent on sequences never trained on: mean over the seeds, least and largest in "
            f"brackets, and the learning rate that was best. Seeds: {_range(seeds)}; learning rates tried with "
            f"every mixer: {_range(rates)}.",
            markdown_table(["tokens", "pairs", "dim", *(STYLE[mixer][0] for mixer in mixers)], rows),
            _findings(found),
        )
    )


def _findings(found: list[dict[str, Any]]) -> str:
    """In how many places of the grid GKA is at or above each other mixer."""
    means: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    for row in found:
        means[row["mixer"]][row["seq_len"], row["dim"]] = statistics.mean(row["accuracies"])
    parts = []
    for mixer in mqar_run.ALL_MIXERS:
        shared = [place for place in means[mixer] if place in means["gka"]]
        if mixer != "gka" and shared:
            apart = [means["gka"][place] - means[mixer][place] for place in shared]
            above, below = sum(x > 0.005 for x in apart), sum(x < -0.005 for x in apart)
            parts.append(
                f"{STYLE[mixer][0]}: above in {above}, level in {len(apart) - above - below}, below in {below}"
            )
    if not parts:
        return ""
    return (
        f"GKA beside each other mixer, by more than half a percent, places of the grid: {'; '.join(parts)}. "
        "The paper's figure 3a has GKA at or above every linear mixer; its models, schedule and number of "
        "examples are not these."
    )


def _shown(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    accuracies = [100 * value for value in row["accuracies"]]
    ends = f" ({min(accuracies):.1f} to {max(accuracies):.1f})" if len(accuracies) > 1 else ""
    return f"{statistics.mean(accuracies):.1f}{ends}, {row['learning_rate']:g}"


def _range(counts: list[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _draw(found: list[dict[str, Any]], tasks: list[tuple[int, int]], mixers: list[str], path: Path) -> None:
    figure, panels = new_panels(1, len(tasks), (max(5.0, 3.6 * len(tasks)), 4.0), 130, sharey=True)
    for axes, (T, pairs) in zip(panels, tasks, strict=True):
        for mixer in mixers:
            name, colour, marker = STYLE[mixer]
            wanted = {"mixer": mixer, "seq_len": T, "num_pairs": pairs}
            points = sorted((r["dim"], r["accuracies"]) for r in found if wanted.items() <= r.items())
            dims = [dim for dim, _ in points]
            axes.plot(dims, [statistics.mean(a) for _, a in points], color=colour, marker=marker, label=name)
            axes.fill_between(
                dims,
                [min(a) for _, a in points],
                [max(a) for _, a in points],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
        axes.set_xscale("log", base=2)
        axes.set_xlabel("model dim")
        axes.set_ylim(-0.03, 1.04)
        axes.set_title(f"{T} tokens, {pairs} pairs", loc="left", fontsize=10)
    panels[0].set_ylabel("accuracy")
    panels[0].legend(frameon=False, fontsize=8)
    save(figure, path)
