"""The section of the experiment `recall`: one table, one picture, and whether the paper's figure 3a holds.

A number of the table is the best accuracy over the learning rates. Learning rates that were needless, because
another one had solved the place, are not missing.

Legend: T tokens of a sequence, P pairs. A setting is a place (T, P) with a dim.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from ..tasks.recall_mixers import MIXERS, heads
from ..tasks.recall_train import RATES, SOLVED
from .picture import draw_band, new_panels, save
from .table import markdown_table, spread

PAPER, REFERENCE, OURS = "gka-paper", "attention", ("gka-paper", "gka")
APART = 0.01  # smaller differences count as equal
Entries = list[dict[str, Any]]
Place = tuple[int, int]


class Found(NamedTuple):
    """One mixer at a setting. `accuracies`: the best one of each seed; `complete`: no learning rate is missing."""

    accuracies: list[float]
    complete: bool


Table = dict[tuple[Place, int, str], Found]  # place, dim, mixer


def best(entries: Entries) -> Table:
    """The best accuracies of every mixer at every setting."""
    groups: dict[tuple[Place, int, str], Entries] = defaultdict(list)
    for entry in entries:
        cell = entry["cell"]
        groups[(cell["seq_len"], cell["num_pairs"]), cell["dim"], cell["mixer"]].append(entry)
    found = {}
    for key, group in groups.items():
        seeds: dict[int, float] = {}
        for entry in group:
            seed, accuracy = entry["cell"]["seed"], entry["result"]["accuracy"]
            seeds[seed] = max(accuracy, seeds.get(seed, 0.0))
        found[key] = Found(list(seeds.values()), max(seeds.values()) > SOLVED or _rates(group) == set(RATES))
    return found


def _rates(group: Entries) -> set[float]:
    """The learning rates that were tried."""
    return {entry["cell"]["learning_rate"] for entry in group if "learning_rate" in entry["cell"]}


def section(entries: Entries, picture: Path) -> str:
    """The text with its table; draws the picture."""
    found = best(entries)
    mixers = [mixer for mixer in MIXERS if any(key[2] == mixer for key in found)]
    settings = sorted({key[:2] for key in found})
    _draw(found, mixers, picture)
    rows = [
        [str(T), str(P), str(dim), *(_cell(found.get(((T, P), dim, mixer))) for mixer in mixers)]
        for (T, P), dim in settings
    ]
    cell = entries[0]["cell"]
    wide = max(dim for _, dim in settings)
    parts = "" if heads(wide) == 1 else f" Recurrent mixers have {heads(wide)} heads at dim {wide}."
    replayed = sum(entry["result"]["graph"] for entry in entries)
    return "\n\n".join(
        (
            "Does the paper's figure 3a hold? It shows the recall of GKA without gates and without the alpha "
            "connection. The setting is the one of Zoology's figure 2: models of two layers with one head and no "
            f"feed-forward part, {cell['train_examples']:,} training sequences, {cell['vocab_size']} tokens in "
            f"the vocabulary, up to {cell['epochs']} epochs, here in {cell['dtype']}. A training ends when its "
            f"accuracy is above {100 * SOLVED:g} percent, or early by the rules in "
            f"`experiments/tasks/recall_train.py`. Learned positions are for softmax attention alone.{parts} "
            "GLA is here the layer of flash-linear-attention, with a short convolution. Linear attention is the "
            "layer of figure 3a without the solve.",
            "The table has the best accuracy in percent over the learning rates, on new sequences. With several "
            "seeds it has the median, with the smallest and largest in brackets. A star marks a number for which "
            "learning rates are missing.",
            markdown_table(["tokens", "pairs", "dim", *(MIXERS[mixer].name for mixer in mixers)], rows),
            " ".join((_attention(found), *verdict(found, mixers), epochs(entries, mixers))),
            f"{len(entries)} trainings took {sum(e['seconds'] for e in entries) / 60:,.0f} minutes, summed over "
            f"processes that share GPUs; {replayed} of them replayed a CUDA graph. Early ends: {_ends(entries)}.",
        )
    )


def _cell(found: Found | None) -> str:
    if found is None:
        return ""
    return spread([100 * accuracy for accuracy in found.accuracies], ".1f") + ("" if found.complete else " *")


def _ends(entries: Entries) -> str:
    counts: dict[str, int] = defaultdict(int)
    for entry in entries:
        counts[entry["result"]["ended"]] += 1
    return ", ".join(f"{ended} {count}" for ended, count in sorted(counts.items()))


def epochs(entries: Entries, mixers: list[str]) -> str:
    """How soon the mixers solve what they solve: the fewest epochs of any learning rate at each setting."""
    fewest: dict[str, dict[tuple[int, ...], int]] = {mixer: {} for mixer in mixers}
    for entry in entries:
        cell, result = entry["cell"], entry["result"]
        if result["ended"] == "solved":
            setting, of = (cell["seq_len"], cell["num_pairs"], cell["dim"]), fewest[cell["mixer"]]
            of[setting] = min(len(result["history"]), of.get(setting, len(result["history"])))
    medians = [
        f"{MIXERS[mixer].name} {statistics.median(of.values()):g} (at {len(of)})"
        for mixer, of in fewest.items()
        if of
    ]
    if not medians:
        return ""
    return (
        f"Median epochs to {100 * SOLVED:g} percent, over the settings that a mixer solves: {', '.join(medians)}."
    )


def _attention(found: Table) -> str:
    """Whether the training is right: attention must solve every setting."""
    theirs = {key[:2]: value for key, value in found.items() if key[2] == REFERENCE}
    if not theirs:
        return "Softmax attention was not trained, so nothing shows that the training is right."
    unsolved = [(setting, value.complete) for setting, value in sorted(theirs.items()) if not _solved(value)]
    if not unsolved:
        return f"Softmax attention is above {100 * SOLVED:g} percent at all {len(theirs)} settings."
    failed, pending = (
        "; ".join(
            f"{T} tokens, {P} pairs, dim {dim}" for ((T, P), dim), complete in unsolved if complete == wanted
        )
        for wanted in (True, False)
    )
    said = []
    if failed:
        said.append(
            f"Softmax attention fails at {failed}: there the training is at fault, and other failures say little."
        )
    if pending:
        said.append(f"Learning rates of softmax attention are missing at {pending}.")
    return " ".join(said)


def _solved(found: Found) -> bool:
    return max(found.accuracies) > SOLVED


def verdict(found: Table, mixers: list[str]) -> tuple[str, str]:
    """Counts, and whether the layer of figure 3a recalls best among the mixers with a state, where attention shows
    that the training is right.
    """
    others = [mixer for mixer in mixers if mixer not in (*OURS, REFERENCE)]
    at: dict[tuple[Place, int], dict[str, Found]] = defaultdict(dict)
    for (place, dim, mixer), value in found.items():
        at[place, dim][mixer] = value
    settings = [
        s for s, all_of in at.items() if PAPER in all_of and REFERENCE in all_of and _solved(all_of[REFERENCE])
    ]
    if not settings or not others:
        return "", "There is nothing to compare yet."
    counts, missing, behind = [], 0, 0
    for mixer in others:
        pairs = [(at[setting][PAPER], at[setting].get(mixer)) for setting in settings]
        signs = [compare(ours, theirs) for ours, theirs in pairs if theirs and ours.complete and theirs.complete]
        missing += len(settings) - len(signs)
        behind += signs.count(-1)
        words = zip(("better", "equal", "worse"), (1, 0, -1), strict=True)
        counts.append(f"{MIXERS[mixer].name}: {', '.join(f'{word} in {signs.count(s)}' for word, s in words)}")
    said = (
        f"{MIXERS[PAPER].name} compared with each mixer that has a state, as numbers of settings where softmax "
        f"attention is above {100 * SOLVED:g} percent (better and worse: by more than {100 * APART:g} point with "
        f"every seed): {'; '.join(counts)}."
    )
    if behind:
        return (
            said,
            f"Figure 3a does not hold in this setting: another mixer recalls more in {behind} comparisons.",
        )
    if missing:
        return said, f"There is no verdict on figure 3a yet: incomplete comparisons: {missing}."
    best_of_all = sum(all(compare(at[s][PAPER], at[s][m]) > 0 for m in others) for s in settings)
    if best_of_all:
        return said, (
            f"Figure 3a holds in this setting: no other mixer with a state recalls more anywhere, and "
            f"{MIXERS[PAPER].name} recalls more than all of them in {best_of_all} of {len(settings)} settings."
        )
    return (
        said,
        f"Figure 3a is neither confirmed nor refuted: in no setting does {MIXERS[PAPER].name} recall most.",
    )


def compare(ours: Found, theirs: Found) -> int:
    """1 if every seed of ours is more than APART above every seed of theirs, -1 if below, else 0."""
    if min(ours.accuracies) > max(theirs.accuracies) + APART:
        return 1
    return -1 if max(ours.accuracies) < min(theirs.accuracies) - APART else 0


def _draw(found: Table, mixers: list[str], path: Path) -> None:
    """Accuracy against dim, one panel per place, as in figure 3a; only where no learning rate is missing."""
    places, every_dim = sorted({key[0] for key in found}), sorted({key[1] for key in found})
    figure, panels = new_panels(1, len(places), (max(5.0, 3.4 * len(places)), 4.0), 130, sharey=True)
    for axes, place in zip(panels, places, strict=True):
        for mixer in mixers:
            points = sorted(
                (dim, value.accuracies)
                for (at, dim, name), value in found.items()
                if (at, name) == (place, mixer) and value.complete
            )
            if points:
                dims, accuracies = zip(*points, strict=True)
                kind = MIXERS[mixer]
                draw_band(
                    axes, dims, accuracies, kind.colour, statistics.median, marker=kind.marker, label=kind.name
                )
        axes.set_xscale("log", base=2)
        axes.set_xticks(every_dim, [str(dim) for dim in every_dim])
        axes.set_xlabel("model dim")
        axes.set_ylim(-0.03, 1.04)
        axes.set_title(f"{place[0]} tokens, {place[1]} pairs", loc="left", fontsize=10)
    panels[0].set_ylabel("accuracy")
    labels: dict[str, Any] = {}
    for axes in panels:
        labels |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    panels[0].legend(labels.values(), labels.keys(), frameon=False, fontsize=8)
    save(figure, path)
