"""The section of the experiment `recall`: one table, one picture, and whether the paper's figure 3a holds.

A number of the table is the best accuracy over the learning rates. Learning rates that were needless, because
another one had solved the place, are not missing.

Legend: T tokens of a sequence, P pairs. A setting is a place (T, P) with a dim.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from ..tasks.recall_mixers import MIXERS, heads
from ..tasks.recall_train import SOLVED
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

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.mean(self.accuracies)


Table = dict[tuple[Place, int, str], Found]  # place, dim, mixer


def best(entries: Entries) -> Table:
    """The best accuracies of every mixer at every setting."""
    groups: dict[tuple[Place, int, str], Entries] = defaultdict(list)
    for entry in entries:
        cell = entry["cell"]
        groups[(cell["seq_len"], cell["num_pairs"]), cell["dim"], cell["mixer"]].append(entry)
    most = max(map(_rates, groups.values()))
    found = {}
    for key, group in groups.items():
        seeds: dict[int, float] = {}
        for entry in group:
            seed, accuracy = entry["cell"]["seed"], entry["result"]["accuracy"]
            seeds[seed] = max(accuracy, seeds.get(seed, 0.0))
        found[key] = Found(list(seeds.values()), max(seeds.values()) > SOLVED or _rates(group) == most)
    return found


def _rates(group: Entries) -> int:
    """The number of learning rates that were tried."""
    return len({entry["cell"]["learning_rate"] for entry in group if "learning_rate" in entry["cell"]})


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
    without = sum(entry["result"]["graph"] for entry in entries)
    return "\n\n".join(
        (
            "Does the paper's figure 3a hold? It shows the recall of GKA without gates and without the alpha "
            "connection. The setting is the one of Zoology's figure 2: models of two layers with one head and no "
            f"feed-forward part, {cell['train_examples']:,} training sequences, {cell['vocab_size']} tokens in "
            f"the vocabulary, up to {cell['epochs']} epochs, here in {cell['dtype']}. A training ends when its "
            f"accuracy is above {100 * SOLVED:g} percent, or early by the rules in "
            f"`experiments/tasks/recall_train.py`. Learned positions are for softmax attention alone.{parts}",
            "The table has the best accuracy in percent over the learning rates, on new sequences. With several "
            "seeds it has the median, with the smallest and largest in brackets. A star marks a number for which "
            "learning rates are missing.",
            markdown_table(["tokens", "pairs", "dim", *(MIXERS[mixer].name for mixer in mixers)], rows),
            " ".join((_attention(found), _verdict(found, mixers))),
            f"{len(entries)} trainings took {sum(e['seconds'] for e in entries) / 60:,.0f} minutes, summed over "
            f"processes that share GPUs; {without} of them replayed a CUDA graph. Early ends: {_ends(entries)}.",
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


def _attention(found: Table) -> str:
    """Whether the training is right: attention must solve every setting."""
    theirs = {key[:2]: value for key, value in found.items() if key[2] == REFERENCE}
    if not theirs:
        return "Softmax attention was not trained, so nothing shows that the training is right."
    failed = [setting for setting, value in sorted(theirs.items()) if max(value.accuracies) <= SOLVED]
    if not failed:
        return f"Softmax attention is above {100 * SOLVED:g} percent at all {len(theirs)} settings."
    where = "; ".join(f"{T} tokens, {P} pairs, dim {dim}" for (T, P), dim in failed)
    return f"Softmax attention fails at {where}: there the training is at fault, and other failures say little."


def _verdict(found: Table, mixers: list[str]) -> str:
    """Whether the layer of figure 3a recalls best among the mixers with a state."""
    others = [mixer for mixer in mixers if mixer not in (*OURS, REFERENCE)]
    if PAPER not in mixers or not others:
        return "There is nothing to compare yet."
    counts, worse, open_settings = [], 0, 0
    better_than_all = 0
    for mixer in others:
        pairs = [
            (ours, found[place, dim, mixer])
            for (place, dim, name), ours in found.items()
            if name == PAPER and (place, dim, mixer) in found
        ]
        closed = [pair for pair in pairs if all(one.complete for one in pair)]
        open_settings += len(pairs) - len(closed)
        apart = [ours.mean - theirs.mean for ours, theirs in closed]
        above, below = sum(x > APART for x in apart), sum(x < -APART for x in apart)
        worse += below
        counts.append(
            f"{MIXERS[mixer].name}: better in {above}, equal in {len(apart) - above - below}, worse in {below}"
        )
    for (place, dim, name), ours in found.items():
        rivals = [found.get((place, dim, mixer)) for mixer in others]
        if name == PAPER and ours.complete and all(rival and rival.complete for rival in rivals):
            better_than_all += all(rival and ours.mean > rival.mean + APART for rival in rivals)
    said = (
        f"{MIXERS[PAPER].name} compared with each mixer that has a state, as numbers of settings (a difference of "
        f"up to {100 * APART:g} point counts as equal): {'; '.join(counts)}."
    )
    if open_settings:
        return f"{said} {open_settings} comparisons miss learning rates: no verdict on figure 3a yet."
    if worse:
        return (
            f"{said} Figure 3a does not hold in this setting: another mixer recalls more in {worse} comparisons."
        )
    if better_than_all:
        return (
            f"{said} Figure 3a holds in this setting: no other mixer with a state recalls more anywhere, and "
            f"{MIXERS[PAPER].name} is better than all of them at {better_than_all} settings."
        )
    return f"{said} Figure 3a is neither confirmed nor refuted: no setting separates the mixers."


def _draw(found: Table, mixers: list[str], path: Path) -> None:
    """Accuracy against dim, one panel per place, as in figure 3a."""
    places = sorted({place for place, _, _ in found})
    figure, panels = new_panels(1, len(places), (max(5.0, 3.4 * len(places)), 4.0), 130, sharey=True)
    for axes, place in zip(panels, places, strict=True):
        for mixer in mixers:
            points = sorted(
                (dim, value.accuracies) for (at, dim, name), value in found.items() if (at, name) == (place, mixer)
            )
            if points:
                dims, accuracies = zip(*points, strict=True)
                kind = MIXERS[mixer]
                draw_band(
                    axes, dims, accuracies, kind.colour, statistics.median, marker=kind.marker, label=kind.name
                )
        axes.set_xscale("log", base=2)
        axes.set_xlabel("model dim")
        axes.set_ylim(-0.03, 1.04)
        axes.set_title(f"{place[0]} tokens, {place[1]} pairs", loc="left", fontsize=10)
    panels[0].set_ylabel("accuracy")
    handles = dict(
        itertools.chain.from_iterable(zip(*reversed(a.get_legend_handles_labels()), strict=True) for a in panels)
    )
    panels[0].legend(handles.values(), handles.keys(), frameon=False, fontsize=8)
    save(figure, path)
