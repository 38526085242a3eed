"""Recall in Zoology's setting: multi-query associative recall, one training for each setting, as in figure 3a.

Figure 3a of arXiv 2511.21016 shows GKA without gates and without the alpha connection. This experiment trains that
layer and eight others in the setting of figure 2 of Zoology (arXiv 2312.04927): models of two blocks
(experiments/tasks/recall_model.py), 100,000 training and 3,000 test sequences, vocabulary 8192, up to 64 epochs
(experiments/tasks/recall_train.py), four learning rates from 1e-4 to 1e-2. The last place is harder than those of
Zoology: it has as many pairs as the state of a model of dim 128 has rows.

The order of the cells: first the five mixers of the verdict at dims 64 and 128, with other seeds where these are
needed; then the other mixers there; then dim 256. In each part every mixer is trained with the likeliest learning
rate at all places before any is trained with the next. Once a rate of a mixer solves a place, its other rates are
needless: the table has the best accuracy. Other seeds, with the best rate, are only for places that no rate solves
and where the accuracy is more than 5 percent.

Legend: T tokens of a sequence, P pairs. A place is a pair (T, P).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..tasks.recall_mixers import MIXERS
from ..tasks.recall_train import RATES, SOLVED, training
from ..tasks.stepwise import Stepwise, finish
from .recall_page import PLACES, VERDICT, VERDICT_DIMS
from .recall_page import section as section
from .record import Cell, Record

SUMMARY = "recall in the setting of the paper's figure 3a"
BY_MACHINE = False
Entries = list[dict[str, Any]]
SEEDS = (0, 1, 2)
LEARNT = 0.05  # accuracy of a mixer that has learnt something
SLOWER = ("attention", "mesa")  # the likeliest rate failed more often with these than the one after it
_BATCH = {16: 32, 64: 512, 128: 512, 256: 256, 512: 128}
_FULL: dict[str, Any] = dict(
    vocab_size=8192, train_examples=100_000, test_examples=3_000, epochs=64, dtype="bfloat16"
)
_SMALL: dict[str, Any] = dict(vocab_size=32, train_examples=512, test_examples=64, epochs=4, dtype="float32")
_GROUP = ("mixer", "dim", "seq_len", "num_pairs", "size")


def cells(size: str) -> list[Cell]:
    """All cells in their order; small: one dim, one short place, the mixers that run on a CPU."""
    if size == "small":
        mixers = ("gka-paper", "gka", "linear", "mamba2", "attention")
        return _part(mixers, (16,), ((16, 2),), _SMALL)
    others = tuple(mixer for mixer in MIXERS if mixer not in VERDICT)
    parts = ((VERDICT, VERDICT_DIMS), (others, VERDICT_DIMS), ((*VERDICT, *others), (256,)))
    return [cell for mixers, dims in parts for cell in _part(mixers, dims, PLACES, _FULL)]


def _part(
    mixers: Iterable[str], dims: Iterable[int], places: Iterable[tuple[int, int]], rest: dict[str, Any]
) -> list[Cell]:
    """The cells of some mixers and dims: the learning rates one after the other, then the other seeds."""
    others = [{"seed": seed, "rates": list(RATES)} for seed in SEEDS[1:]]
    kinds = {
        mixer: [{"seed": SEEDS[0], "learning_rate": rate} for rate in _likeliest_first(mixer)] + others
        for mixer in mixers
    }
    return [
        {"mixer": mixer, "dim": dim, "seq_len": T, "num_pairs": P, **kind[number], "batch_size": _BATCH[T], **rest}
        for number, (T, P), dim, (mixer, kind) in itertools.product(
            range(len(RATES) + len(others)), places, dims, kinds.items()
        )
    ]


def _likeliest_first(mixer: str) -> tuple[float, ...]:
    first, second, *others = RATES
    return (second, first, *others) if mixer in SLOWER else RATES


def ready(cell: Cell, entries: Entries) -> bool | None:
    """Whether a cell may run now: True, False for later, None if other results make it needless."""
    first = [entry for entry in _group(cell, entries) if "learning_rate" in entry["cell"]]
    best = max((entry["result"]["accuracy"] for entry in first), default=0.0)
    if best > SOLVED:
        return None
    if "learning_rate" in cell:
        return True
    if {entry["cell"]["learning_rate"] for entry in first} < set(cell["rates"]):
        return False
    return True if best > LEARNT else None


def run(cell: Cell, folder: Path, device: torch.device) -> Any:
    """Run `stepwise` to its end."""
    return finish(stepwise(cell, folder, device), device)


def stepwise(cell: Cell, folder: Path, device: torch.device) -> Stepwise:
    """Train one model; the other seeds with the best learning rate of the first."""
    record = Record(folder.parents[1] / "recall.json", "recall")
    same = _group(cell, record.entries)
    if "learning_rate" in cell:
        rate = cell["learning_rate"]
        rivals = [entry["result"]["history"] for entry in same if "learning_rate" in entry["cell"]]
    else:
        shared = {name: cell[name] for name in _GROUP if name in cell}
        rate = record.best_rate(shared, cell["rates"], lambda entry: -entry["result"]["accuracy"])
        rivals = []
    found = yield from training({**cell, "learning_rate": rate}, rivals, device, folder)
    return {"learning_rate": rate, **found}


def _group(cell: Cell, entries: Entries) -> Entries:
    """The entries of the same mixer, dim and place."""
    wanted = [cell.get(name) for name in _GROUP]
    return [entry for entry in entries if [entry["cell"].get(name) for name in _GROUP] == wanted]
