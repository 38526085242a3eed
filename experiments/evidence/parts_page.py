"""The sections of the experiment `parts`: the short one with the answer, and all settings with the gates.

A variant is clearly better than another one at a setting if each of its seeds is more than half a percent above
each seed of the other; for this both need two seeds.

Legend: T tokens of a sequence, P pairs. A setting is a pair (T, P); the hardest one has the most pairs.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from .picture import new_panels, save
from .table import markdown_table, spread

BASE, NO_SOLVE, OTHERS = "default", "no solve (GLA)", ("figure 3a", "figure 3a, no solve")
APART = 0.005  # smaller differences count as equal
_ROWS = 10  # of the short table
_NOTHING = "No variant has been trained with the first seed yet."
Entries = list[dict[str, Any]]
Task = tuple[int, int]


class Found(NamedTuple):
    """A variant at a dim, with its best rate: accuracies by setting and seed, and the results of the seeds."""

    rate: float
    accuracies: dict[Task, list[float]]
    results: list[dict[str, Any]]

    @property
    def means(self) -> list[float]:
        """The mean over the settings, of each seed."""
        return [statistics.mean(seed) for seed in zip(*self.accuracies.values(), strict=True)]


Table = dict[int, dict[str, Found]]  # by dim and variant


def best(entries: Entries) -> Table:
    """The accuracies of every variant at every dim, with the rate that is best for the first seed."""
    groups: dict[tuple[int, str], Entries] = defaultdict(list)
    for entry in entries:
        groups[entry["cell"]["dim"], entry["cell"]["variant"]].append(entry)
    table: Table = defaultdict(dict)
    for (dim, variant), group in groups.items():
        tried = [entry["result"] for entry in group if "learning_rate" in entry["cell"]]
        if not tried:
            continue
        rate = max(tried, key=_mean)["learning_rate"]
        chosen = [entry["result"] for entry in group if entry["result"]["learning_rate"] == rate]
        by_task: dict[Task, list[float]] = defaultdict(list)
        for result in chosen:
            for T, P, accuracy in result["accuracy"]:
                by_task[T, P].append(accuracy)
        table[dim][variant] = Found(rate, dict(by_task), chosen)
    return dict(sorted(table.items(), reverse=True))


def _mean(result: dict[str, Any]) -> float:
    return statistics.mean(accuracy for _, _, accuracy in result["accuracy"])


def compare(ours: list[float], theirs: list[float]) -> int:
    """1 if ours is clearly better, -1 if clearly worse, else 0."""
    if min(len(ours), len(theirs)) < 2:
        return 0
    if min(ours) > max(theirs) + APART:
        return 1
    return -1 if max(ours) < min(theirs) - APART else 0


def overview(entries: Entries) -> str:
    """Question, table of at most ten rows, and answer."""
    table = best(entries)
    if not table:
        return _NOTHING
    dim, cell = next(iter(table)), entries[0]["cell"]
    hardest = max(next(iter(table[dim].values())).accuracies)
    T, P = hardest
    heads = [head for d in table for head in (f"{T} tokens, {P} pairs, dim {d}", f"mean, dim {d}")]
    rows = [
        [name, *(text for found in table.values() for text in _numbers(found.get(name), hardest))]
        for name in _chosen(table[dim], hardest)
    ]
    return "\n\n".join(
        (
            "Why does the default layer recall less than the same layer without the solve? The models of the "
            f"experiment `mqar` train again, {cell['steps']} steps of {cell['batch_tokens']:,} tokens, in "
            "bfloat16, each with one change of the layer. The numbers are percent of right answers on new "
            "sequences, the median of the seeds with the smallest and largest in brackets: at the hardest "
            "setting, and in the mean over the settings. Besides the default and the layer without the solve the "
            f"table has up to {_ROWS - 2} variants that differ most from the default; the picture has all.",
            markdown_table(["variant", *heads], rows),
            answer(table),
        )
    )


def _chosen(found: dict[str, Found], hardest: Task) -> list[str]:
    """The default, the layer without the solve, and those that differ most from the default, best first."""
    middle = {name: statistics.median(each.accuracies[hardest]) for name, each in found.items()}
    first = [name for name in (BASE, NO_SOLVE) if name in found]
    base = middle.get(BASE, 0.0)
    others = sorted((n for n in found if n not in first), key=lambda n: -abs(middle[n] - base))[: _ROWS - 2]
    return first + sorted(others, key=lambda n: -middle[n])


def _numbers(found: Found | None, task: Task) -> list[str]:
    return ["", ""] if found is None else [_percent(found.accuracies[task]), _percent(found.means)]


def _percent(accuracies: list[float]) -> str:
    return spread([100 * accuracy for accuracy in accuracies], ".1f")


def answer(table: Table) -> str:
    """Whether the default is worse without a solve, and the changes that make up for it; from the first dim."""
    dim = next(iter(table))
    found = table[dim]
    if BASE not in found or NO_SOLVE not in found:
        return "The default or the layer without the solve has not been trained yet, so there is no answer."
    T, P = hardest = max(found[BASE].accuracies)
    at = {name: each.accuracies[hardest] for name, each in found.items()}
    sign = compare(at[BASE], at[NO_SOLVE])
    words = {1: "clearly better", 0: "no clear difference", -1: "clearly worse"}
    first = (
        f"With {T} tokens, {P} pairs and dim {dim} the default has {_percent(at[BASE])}, the layer without the "
        f"solve {_percent(at[NO_SOLVE])}: {words[sign]}."
    )
    single = [name for name in found if name not in (BASE, NO_SOLVE, *OTHERS)]
    better = [name for name in single if compare(at[name], at[BASE]) > 0]
    worse = [name for name in single if compare(at[name], at[BASE]) < 0]
    enough = [name for name in better if compare(at[name], at[NO_SOLVE]) >= 0]
    if sign < 0 and enough:
        said = f"One change makes up for the difference: {_listed(enough)}"
    elif sign < 0 and better:
        said = f"Changes that help, though none makes up for the difference alone: {_listed(better)}"
    elif better:
        said = f"Clearly better than the default with one change: {_listed(better)}"
    else:
        said = "No single change is clearly better than the default there"
    if better:
        safe = [name for name in better if not _worse_somewhere(table, name)]
        at_all = "all of them" if safe == better else _listed(safe) or "none"
        said += (
            f" (at no setting clearly worse than the default: {at_all}; the section `ablations` has language "
            "models with such changes)"
        )
    few = [name for name in (BASE, NO_SOLVE, *single) if len(at[name]) < 2]
    tail = f"; clearly worse: {_listed(worse)}" if worse else "; no change is clearly worse"
    return f"{first} {said}{tail}{f'; one seed alone, so no verdict: {_listed(few)}' if few else ''}."


def _worse_somewhere(table: Table, name: str) -> bool:
    """Whether a variant is clearly worse than the default at any setting of any dim."""
    return any(
        compare(found[name].accuracies[task], theirs) < 0
        for found in table.values()
        if name in found and BASE in found
        for task, theirs in found[BASE].accuracies.items()
    )


def _listed(names: list[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def section(entries: Entries, picture: Path) -> str:
    """Every setting, the rates, and the gates before and after the training; draws the picture."""
    table = best(entries)
    if not table:
        return _NOTHING
    hardest = max(next(iter(next(iter(table.values())).values())).accuracies)
    _draw(table, hardest, picture)
    parts = [
        "Accuracies are in percent: the median of the seeds, with the smallest and largest in brackets. A variant "
        f"is clearly better than another one if each of its seeds is more than {100 * APART:g} points above each "
        "seed of the other. Every variant starts with the weights of the default, where it has the same parts."
    ]
    for dim, found in table.items():
        tasks = sorted(next(iter(found.values())).accuracies)
        rows = [[name, *(_percent(each.accuracies[task]) for task in tasks)] for name, each in found.items()]
        parts += [
            f"## Dim {dim}",
            markdown_table(["variant", *(f"{T} tokens, {P} pairs" for T, P in tasks)], rows),
            "The learning rate with the best mean for the first seed, the seeds, divergences, and the training "
            "loss at the end:",
            markdown_table(
                ["variant", "rate", "seeds", "diverged", "last loss"], [_training(*item) for item in found.items()]
            ),
            "Gates on sequences of the hardest setting, before and after the training: memory, the number of "
            "tokens in which the state decays by a factor e; alpha; beta. Median over heads and seeds:",
            markdown_table(
                ["variant", "layer", "memory", "alpha", "beta"],
                [row for name, each in found.items() for row in _gates(name, each)],
            ),
        ]
    replayed = sum(entry["result"]["graph"] for entry in entries)
    parts.append(
        f"{len(entries)} trainings took {sum(entry['seconds'] for entry in entries) / 60:,.0f} minutes, summed "
        f"over processes; {replayed} of them replayed CUDA graphs."
    )
    return "\n\n".join(parts)


def _training(name: str, found: Found) -> list[str]:
    losses = [result["loss"][-1][1] if result["loss"] else None for result in found.results]
    diverged = sum(result["diverged"] is not None for result in found.results)
    return [name, f"{found.rate:g}", str(len(found.results)), str(diverged), spread(losses, ".3f")]


def _gates(name: str, found: Found) -> list[list[str]]:
    """A row per layer: each gate before and after the training."""
    both = [result["gates"] for result in found.results if result["gates"]["trained"] is not None]
    if not both:
        return []

    def middle(when: str, layer: int, gate: str) -> float | None:
        values = [x for gates in both for x in gates[when][layer].get(gate, [])]
        return statistics.median(values) if values else None

    rows = []
    for layer in range(len(both[0]["first"])):
        texts = []
        for gate, show in (("decay", _memory), ("alpha", _plain), ("beta", _plain)):
            before, after = middle("first", layer, gate), middle("trained", layer, gate)
            texts.append("" if before is None or after is None else f"{show(before)} to {show(after)}")
        rows.append([name, str(layer), *texts])
    return rows


def _memory(decay: float) -> str:
    """Tokens in which exp(mean log-decay) falls to 1/e."""
    if decay <= 0:
        return "0"
    return "no decay" if decay >= 1 else f"{-1 / math.log(decay):,.1f}"


def _plain(value: float) -> str:
    return f"{value:.2f}"


def _draw(table: Table, hardest: Task, path: Path) -> None:
    """The seeds of every variant at the hardest setting, one panel per dim."""
    names = list(dict.fromkeys(name for found in table.values() for name in found))
    height = 1.2 + 0.28 * len(names)
    figure, panels = new_panels(1, len(table), (4.2 + 3.8 * len(table), height), 120, sharey=True)
    for axes, (dim, found) in zip(panels, table.items(), strict=True):
        for name, each in found.items():
            values = [100 * x for x in each.accuracies[hardest]]
            place = [names.index(name)] * len(values)
            colour = {BASE: "#1d3557", NO_SOLVE: "#3d7ea6"}.get(name, "#c8553d")
            axes.plot(values, place, "o", color=colour, markersize=5, alpha=0.75)
            if name in (BASE, NO_SOLVE):
                axes.axvline(statistics.median(values), color=colour, linewidth=1.0, linestyle="--")
        axes.set_xlabel("accuracy in percent, by seed")
        axes.set_title(f"{hardest[0]} tokens, {hardest[1]} pairs, dim {dim}", loc="left", fontsize=10)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].invert_yaxis()
    save(figure, path)
