"""All tables of the experiment `mqar`, the text about them, and its picture.

Legend: T tokens of a sequence, P pairs. A setting is a pair (T, P) with a dim.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from ..tasks.mqar_options import ALL_MIXERS
from ..tasks.mqar_report import STYLE
from .picture import draw_band, new_panels, save
from .table import markdown_table

_APART = 0.005  # smaller differences count as equal
_LEARNT = 0.2  # accuracy of a model that has begun to learn the task
Entries = list[dict[str, Any]]
Task = tuple[int, int]  # T, P


def mean_accuracy(entry: dict[str, Any]) -> float:
    """Over all settings of a training."""
    return statistics.mean(accuracy for _, _, accuracy in entry["result"]["accuracy"])


def best(entries: Entries) -> list[dict[str, Any]]:
    """For each mixer and dim: the mean accuracy by rate, the best rate, and the accuracies with it by task."""
    groups: dict[tuple[int, str], Entries] = defaultdict(list)
    for entry in entries:
        groups[entry["cell"]["dim"], entry["cell"]["mixer"]].append(entry)
    found = []
    for (dim, mixer), group in sorted(groups.items(), key=lambda item: (item[0][0], ALL_MIXERS.index(item[0][1]))):
        tried = [entry for entry in group if "learning_rate" in entry["cell"]]
        if not tried:
            continue
        rates = {entry["result"]["learning_rate"]: mean_accuracy(entry) for entry in tried}
        rate = max(rates, key=rates.__getitem__)
        chosen = [entry for entry in group if entry["result"]["learning_rate"] == rate]
        by_task: dict[Task, list[float]] = defaultdict(list)
        for entry in chosen:
            for T, P, accuracy in entry["result"]["accuracy"]:
                by_task[T, P].append(accuracy)
        found.append(
            {"dim": dim, "mixer": mixer, "learning_rate": rate, "rates": rates, "accuracies": dict(by_task)}
        )
    return found


def page_text(entries: Entries, picture: Path, described: str) -> str:
    """`described`, and tables of means, of all settings and of the rates; the picture has one panel per task."""
    found = best(entries)
    mixers = [mixer for mixer in ALL_MIXERS if any(row["mixer"] == mixer for row in found)]
    tasks = sorted({task for row in found for task in row["accuracies"]})
    _draw(found, [task for task in tasks if 4 * task[1] == task[0]], mixers, picture)
    at = {(row["dim"], row["mixer"]): row for row in found}
    dims = sorted({dim for dim, _ in at})
    means = [[str(dim), *(_percent(over_tasks(at.get((dim, mixer)))) for mixer in mixers)] for dim in dims]
    rows = [
        [str(T), str(P), str(dim), *(_percent(_of_task(at.get((dim, mixer)), (T, P))) for mixer in mixers)]
        for (T, P), dim in itertools.product(tasks, dims)
    ]
    rates = sorted({rate for row in found for rate in row["rates"]})
    tried = [
        [
            str(row["dim"]),
            STYLE[row["mixer"]][0],
            *(f"{100 * row['rates'][rate]:.1f}" if rate in row["rates"] else "" for rate in rates),
        ]
        for row in found
    ]
    names = [STYLE[mixer][0] for mixer in mixers]
    return "\n\n".join(
        (
            described,
            "The tables have the accuracy in percent on new sequences: the mean over the seeds "
            f"({_counts(found)}), with the smallest and largest in brackets. A difference between two mixers "
            "means nothing if it is smaller than the spread between the seeds of one mixer. The learning rate "
            "was chosen by these accuracies, with the first seed. A setting is a number of tokens with a number "
            f"of pairs. Mean over the {len(tasks)} settings:",
            markdown_table(["dim", *names], means),
            _findings(found),
            "Every setting:",
            markdown_table(["tokens", "pairs", "dim", *names], rows),
            "Mean accuracy with each learning rate, first seed. The best rate was used:",
            markdown_table(["dim", "mixer", *(f"{rate:g}" for rate in rates)], tried),
        )
    )


def _counts(found: list[dict[str, Any]]) -> str:
    """The number of seeds, and the mixers and dims that have fewer."""
    seeds = {(row["mixer"], row["dim"]): min(map(len, row["accuracies"].values())) for row in found}
    most = max(seeds.values())
    fewer: dict[tuple[int, int], list[str]] = defaultdict(list)
    for (mixer, dim), count in seeds.items():
        if count < most:
            fewer[count, dim].append(STYLE[mixer][0])
    return "; ".join(
        [str(most), *(f"{count} of {', '.join(who)} at dim {dim}" for (count, dim), who in sorted(fewer.items()))]
    )


def _is_lost(row: dict[str, Any]) -> bool:
    """Whether the best training fails even at the easiest setting."""
    return statistics.mean(row["accuracies"][min(row["accuracies"])]) < _LEARNT


def lost(found: list[dict[str, Any]]) -> str:
    """The mixers that did not learn the task, with the dims."""
    dims: dict[str, list[str]] = defaultdict(list)
    for row in filter(_is_lost, found):
        dims[row["mixer"]].append(str(row["dim"]))
    return "; ".join(f"{STYLE[mixer][0]} at dim {' and '.join(where)}" for mixer, where in dims.items())


def _about_lost(found: list[dict[str, Any]]) -> str:
    said = lost(found)
    return said and (
        f" Failed training: {said}. Even with the best learning rate, the accuracy is below {100 * _LEARNT:g} "
        "percent at the easiest setting. These numbers show that the training failed with these steps and "
        "initial weights. They say nothing about the mixer."
    )


class Compared(NamedTuple):
    """GKA and another mixer, as numbers of settings that both have learnt."""

    better: int
    equal: int
    worse: int
    clearly_worse: int  # every seed of GKA is more than _APART below every seed of the other


def compared(found: list[dict[str, Any]]) -> dict[str, Compared]:
    """GKA compared with each other mixer, without trainings that failed."""
    learnt = [row for row in found if not _is_lost(row)]
    seeds = {(row["mixer"], row["dim"], task): a for row in learnt for task, a in row["accuracies"].items()}
    counts = {}
    for other in (mixer for mixer in ALL_MIXERS if mixer != "gka"):
        pairs = [
            (seeds["gka", dim, task], theirs)
            for (mixer, dim, task), theirs in seeds.items()
            if mixer == other and ("gka", dim, task) in seeds
        ]
        if pairs:
            apart = [statistics.mean(ours) - statistics.mean(theirs) for ours, theirs in pairs]
            above, below = sum(x > _APART for x in apart), sum(x < -_APART for x in apart)
            clear = sum(max(ours) < min(theirs) - _APART for ours, theirs in pairs)
            counts[other] = Compared(above, len(apart) - above - below, below, clear)
    return counts


def _findings(found: list[dict[str, Any]]) -> str:
    """The number of settings where GKA is better or worse than each other mixer; failed trainings."""
    parts, holds, fails = [], [], []
    for other, (better, equal, worse, clear) in compared(found).items():
        name = STYLE[other][0]
        parts.append(f"{name}: better in {better}, equal in {equal}, worse in {worse}")
        if other != "attention":
            settings = f"{name} ({clear} of {better + equal + worse} settings)"
            fails.append(settings) if clear else holds.append(name)
    said = []
    if parts:
        said.append(
            "GKA compared with each other mixer, as numbers of settings (a difference of up to half a percent "
            f"counts as equal): {'; '.join(parts)}."
        )
    if fails:
        said.append(
            "GKA is clearly worse than another mixer if each seed of GKA is more than half a percent below each "
            f"seed of the other mixer. It is clearly worse than {'; '.join(fails)}."
        )
    if holds:
        said.append(f"At no setting is GKA clearly worse than {', '.join(holds)}.")
    if fails or holds:
        said.append(
            "These results do not test figure 3a of the paper. That figure shows the layer without gates and "
            "without the alpha connection; here both are on. Models, schedule and number of examples differ too. "
            "The experiment `recall` is in the setting of that figure."
        )
    return " ".join(said) + _about_lost(found)


def over_tasks(row: dict[str, Any] | None) -> list[float]:
    """The mean over all tasks, for each seed that has all tasks."""
    return (
        [] if row is None else [statistics.mean(seed) for seed in zip(*row["accuracies"].values(), strict=False)]
    )


def _of_task(row: dict[str, Any] | None, task: Task) -> list[float]:
    return [] if row is None else row["accuracies"].get(task, [])


def _percent(accuracies: list[float]) -> str:
    if not accuracies:
        return ""
    least, most = 100 * min(accuracies), 100 * max(accuracies)
    ends = f" ({least:.1f} to {most:.1f})" if len(accuracies) > 1 else ""
    return f"{100 * statistics.mean(accuracies):.1f}{ends}"


def _draw(found: list[dict[str, Any]], tasks: list[Task], mixers: list[str], path: Path) -> None:
    figure, panels = new_panels(1, len(tasks), (max(5.0, 3.6 * len(tasks)), 4.0), 130, sharey=True)
    for axes, task in zip(panels, tasks, strict=True):
        for mixer in mixers:
            name, colour, marker = STYLE[mixer]
            points = [(row["dim"], row["accuracies"][task]) for row in found if row["mixer"] == mixer]
            dims, accuracies = [dim for dim, _ in points], [values for _, values in points]
            draw_band(axes, dims, accuracies, colour, statistics.mean, marker=marker, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("model dim")
        axes.set_ylim(-0.03, 1.04)
        axes.set_title(f"{task[0]} tokens, {task[1]} pairs", loc="left", fontsize=10)
    panels[0].set_ylabel("accuracy")
    panels[0].legend(frameon=False, fontsize=8)
    save(figure, path)
