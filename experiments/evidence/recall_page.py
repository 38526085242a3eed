"""The section of the experiment `recall`: one table, one picture, and whether the paper's figure 3a holds.

A number of the table is the best accuracy over the learning rates. Learning rates that were needless, because
another one had solved the place, are not missing.

Legend: T tokens of a sequence, P pairs. A setting is a place (T, P) with a dim.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from ..tasks.recall_mixers import MIXERS, heads
from ..tasks.recall_train import RATES, SOLVED
from .recall_picture import draw
from .table import markdown_table, spread

VERDICT = ("gka-paper", "gla", "attention", "mesa", "gdn")
VERDICT_DIMS = (64, 128)
PLACES = ((64, 4), (128, 8), (256, 16), (512, 64), (512, 128))
PAPER, REFERENCE, OURS = "gka-paper", "attention", ("gka-paper", "gka")
APART = 0.01  # smaller differences count as equal
Entries = list[dict[str, Any]]
Place = tuple[int, int]
Setting = tuple[Place, int]  # with a dim


class Found(NamedTuple):
    """One mixer at a setting. `results`: of each seed the best training; `complete`: no rate is missing."""

    results: list[dict[str, Any]]
    complete: bool

    @property
    def accuracies(self) -> list[float]:
        return [result["accuracy"] for result in self.results]


Table = dict[tuple[Place, int, str], Found]  # place, dim, mixer


def best(entries: Entries) -> Table:
    """The best accuracies of every mixer at every setting."""
    groups: dict[tuple[Place, int, str], Entries] = defaultdict(list)
    for entry in entries:
        cell = entry["cell"]
        groups[(cell["seq_len"], cell["num_pairs"]), cell["dim"], cell["mixer"]].append(entry)
    found = {}
    for key, group in groups.items():
        seeds: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for entry in group:
            seeds[entry["cell"]["seed"]].append(entry["result"])
        of_seeds = Found([max(each, key=itemgetter("accuracy")) for each in seeds.values()], complete=False)
        found[key] = of_seeds._replace(complete=_solved(of_seeds) or _rates(group) == set(RATES))
    return found


def _rates(group: Entries) -> set[float]:
    """The learning rates that were tried."""
    return {entry["cell"]["learning_rate"] for entry in group if "learning_rate" in entry["cell"]}


def section(entries: Entries, picture: Path) -> str:
    """The text with its table; draws the picture."""
    found = best(entries)
    mixers = [mixer for mixer in MIXERS if any(key[2] == mixer for key in found)]
    settings = sorted({key[:2] for key in found})
    curves = {key: [result["history"] for result in of.results if of.complete] for key, of in found.items()}
    draw(curves, picture)
    rows = [
        [str(T), str(P), str(dim), *(_cell(found.get(((T, P), dim, mixer))) for mixer in mixers)]
        for (T, P), dim in settings
    ]
    cell = entries[0]["cell"]
    wide = max(dim for _, dim in settings)
    parts = "" if heads(wide) == 1 else f" Recurrent mixers have {heads(wide)} heads at dim {wide}."
    solved = f"{100 * SOLVED:g}"
    replayed = sum(entry["result"]["graph"] for entry in entries)
    return "\n\n".join(
        (
            "Does the paper's figure 3a hold? It shows GKA without gates and without the alpha connection above "
            "all other layers that have a state. Here it holds if none of them recalls more at any setting, and "
            "that layer recalls more than all of them at one or more. The setting is the one of Zoology's figure "
            "2: models of two layers with one head and no feed-forward part, "
            f"{cell['train_examples']:,} training sequences, {cell['vocab_size']} tokens in the vocabulary, up to "
            f"{cell['epochs']} epochs, here in {cell['dtype']}. Learned positions are for softmax attention alone."
            f"{parts}{_about(mixers)}",
            f"A training ends when its accuracy is above {solved} percent. So two mixers that get there are equal "
            "here; how soon they do is in the picture. A training also ends if its accuracy stays near 0 or at "
            "guessing while its loss does not fall, or if it is far behind another learning rate (`hopeless` in "
            "`experiments/tasks/recall_train.py`).",
            f"The table has the best accuracy in percent over the learning rates {_listed(RATES)}, on new "
            f"sequences. After one of them gets above {solved}, the others are not run.{_about_seeds(entries)} "
            "A star: not all learning rates were tried yet. Empty: not trained yet.",
            "The picture has the accuracy after each epoch, for numbers without a star. A curve ends with a mark.",
            markdown_table(["tokens", "pairs", "dim", *(MIXERS[mixer].name for mixer in mixers)], rows),
            " ".join(filter(None, (attention(found), *verdict(found, *wanted(entries)), epochs(entries, mixers)))),
            f"{len(entries)} trainings took {_duration(sum(e['seconds'] for e in entries))}, summed over "
            f"processes that share GPUs; {replayed} of them replayed a CUDA graph. How they ended: "
            f"{_ends(entries)}.",
        )
    )


def _about(mixers: list[str]) -> str:
    """What a reader must know of some mixers, if they are in the table."""
    notes = {
        "gla": " GLA is the layer of flash-linear-attention, with a short convolution.",
        "linear": " Linear attention is the layer of figure 3a without the solve.",
    }
    return "".join(note for mixer, note in notes.items() if mixer in mixers)


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in sorted(rates))


def have_one_seed(entries: Entries) -> bool:
    """Whether all trainings have the same seed."""
    return len({entry["cell"]["seed"] for entry in entries}) == 1


def _about_seeds(entries: Entries) -> str:
    if have_one_seed(entries):
        return " All trainings have the same seed."
    return " With several seeds the number is the median, with the smallest and largest in brackets."


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
    """How soon the mixers reach SOLVED, at the settings that all of them reach which reach any.

    Once a learning rate reaches it the others are needless, so it is the first rate that did.
    """
    first: dict[str, dict[Setting, int]] = {mixer: {} for mixer in mixers}
    for entry in entries:
        cell, result = entry["cell"], entry["result"]
        if result["ended"] == "solved" and "learning_rate" in cell:
            setting = (cell["seq_len"], cell["num_pairs"]), cell["dim"]
            first[cell["mixer"]].setdefault(setting, len(result["history"]))
    first = {mixer: of for mixer, of in first.items() if of}
    common = set.intersection(*(set(of) for of in first.values())) if first else set()
    if not common:
        return ""
    medians = (f"{MIXERS[mixer].name} {statistics.median(of[s] for s in common):g}" for mixer, of in first.items())
    return (
        f"Median epochs to {100 * SOLVED:g} percent, with the learning rate that reached it first, at the "
        f"{len(common)} settings that these mixers all reach: {', '.join(medians)}."
    )


def attention(found: Table) -> str:
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


def _duration(seconds: float) -> str:
    return f"{seconds / 60:,.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def _solved(found: Found) -> bool:
    return max(found.accuracies) > SOLVED


def wanted(entries: Entries) -> tuple[list[Setting], list[str]]:
    """Settings and rivals of the verdict: those of the full experiment, or all that were run in another size."""
    if entries[0]["cell"].get("size") == "full":
        return list(itertools.product(PLACES, VERDICT_DIMS)), [m for m in VERDICT if m not in (PAPER, REFERENCE)]
    run = best(entries)
    rivals = [mixer for mixer in MIXERS if mixer not in (*OURS, REFERENCE) and any(k[2] == mixer for k in run)]
    return sorted({key[:2] for key in run}), rivals


def verdict(found: Table, settings: list[Setting], rivals: list[str]) -> tuple[str, str]:
    """Counts, and whether the layer of figure 3a recalls best among the mixers with a state, where attention shows
    that the training is right.

    Missing learning rates can only raise an accuracy. So a layer that is above SOLVED loses to none, and a better
    one stays better.
    """
    theirs = {setting: found.get((*setting, REFERENCE)) for setting in settings}
    failed = [s for s, reference in theirs.items() if reference and reference.complete and not _solved(reference)]
    valid = [s for s in settings if s not in failed]  # or it is not known yet
    if not valid or not rivals:
        return "", "There is nothing to compare."
    signs: dict[str, dict[Setting, int]] = {mixer: {} for mixer in rivals}
    for mixer, setting in itertools.product(rivals, valid):
        reference = theirs[setting]
        ours, other = found.get((*setting, PAPER)), found.get((*setting, mixer))
        if reference and reference.complete and ours and other and other.complete:
            sign = compare(ours, other)
            if ours.complete or sign == 1:
                signs[mixer][setting] = sign
    counts = "; ".join(f"{MIXERS[mixer].name}: {_counted(list(of.values()))}" for mixer, of in signs.items())
    with_seeds = " with every seed" if any(len(each.results) > 1 for each in found.values()) else ""
    said = (
        f"{MIXERS[PAPER].name} compared with other mixers that have a state, as numbers of settings where softmax "
        f"attention is above {100 * SOLVED:g} percent (better and worse: by more than {100 * APART:g} point"
        f"{with_seeds}; two above {100 * SOLVED:g} percent are equal): {counts}."
    )
    every = [sign for of in signs.values() for sign in of.values()]
    where = f"where softmax attention is above {100 * SOLVED:g} percent"
    if -1 in every:
        return said, (
            f"Figure 3a does not hold in this setting: {where}, another mixer recalls more in {every.count(-1)} "
            f"of {len(every)} comparisons."
        )
    total = len(valid) * len(rivals)
    most = sum(all(signs[mixer].get(setting, 0) > 0 for mixer in rivals) for setting in valid)
    may_lose = any(
        setting not in signs[mixer] and not ((ours := found.get((*setting, PAPER))) and _solved(ours))
        for mixer, setting in itertools.product(rivals, valid)
    )
    may_win = any(all(signs[mixer].get(setting, 1) > 0 for mixer in rivals) for setting in valid)
    if may_lose or (may_win and not most):
        return said, (
            f"There is no verdict on figure 3a yet: {len(every)} of {total} comparisons are "
            f"decided, in which {MIXERS[PAPER].name} is {_counted(every)}."
        )
    rest = (
        f" {total - len(every)} of {total} comparisons are not decided. They cannot change this, since "
        f"{MIXERS[PAPER].name} is above {100 * SOLVED:g} percent there."
    ) * (len(every) < total)
    among = f"among {', '.join(MIXERS[mixer].name for mixer in rivals)}"
    if most:
        return said, (
            f"Figure 3a holds in this setting: {where}, none {among} recalls more anywhere, and "
            f"{MIXERS[PAPER].name} recalls more than all of them at {most} of {len(valid)} settings.{rest}"
        )
    return said, (
        f"Figure 3a is neither confirmed nor refuted: {where}, none {among} recalls more, and "
        f"{MIXERS[PAPER].name} nowhere recalls more than all of them.{rest}"
    )


def _counted(signs: list[int]) -> str:
    return f"better in {signs.count(1)}, equal in {signs.count(0)}, worse in {signs.count(-1)}"


def compare(ours: Found, theirs: Found) -> int:
    """1 if every seed of ours is more than APART above every seed of theirs, -1 if below, else 0."""
    if min(ours.accuracies) > max(theirs.accuracies) + APART:
        return 1
    return -1 if max(ours.accuracies) < min(theirs.accuracies) - APART else 0
