"""The picture of the experiment `recall`: how soon the mixers learn, a column for each place, a row for each dim.

Most mixers reach 99 percent at most places, so their last accuracies would be one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..tasks.recall_mixers import MIXERS
from .picture import new_panels, save

Place = tuple[int, int]  # tokens, pairs
History = list[list[Any]]  # of a training: [epoch, accuracy, loss] of every epoch


def draw(curves: dict[tuple[Place, int, str], list[History]], path: Path) -> None:
    """Draw the accuracy after each epoch.

    Args:
        curves: of every place, dim and mixer the trainings to draw, none if they are not finished.
        path: of the PNG.
    """
    places, dims = sorted({key[0] for key in curves}), sorted({key[1] for key in curves})
    size = (max(5.0, 2.7 * len(places)), 2.3 * len(dims) + 0.7)
    figure, panels = new_panels(len(dims), len(places), size, 130, sharex=True, sharey=True)
    longest = max((len(history) for trainings in curves.values() for history in trainings), default=1)
    labels: dict[str, Any] = {}
    for number, axes in enumerate(panels):
        dim, place = dims[number // len(places)], places[number % len(places)]
        for order, (name, mixer) in enumerate(MIXERS.items()):  # the first above the others
            for history in filter(None, curves.get((place, dim, name), [])):
                epochs, accuracies, _ = zip(*history, strict=True)
                marked = {
                    "marker": mixer.marker,
                    "markevery": [len(epochs) - 1],
                    "zorder": 3 - order / len(MIXERS),
                }
                percent = [100 * accuracy for accuracy in accuracies]
                (labels[mixer.name],) = axes.plot(epochs, percent, color=mixer.colour, **marked)
        if not axes.lines:
            axes.text(0.5, 0.5, "not finished yet", transform=axes.transAxes, ha="center", color="#6b6b6b")
        axes.set_title(f"{place[0]} tokens, {place[1]} pairs, dim {dim}", loc="left", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xlim(0.85, 1.15 * max(2, longest))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(-3, 104)
        if axes.get_subplotspec().is_last_row():
            axes.set_xlabel("epochs (log scale)")
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("accuracy, percent")
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    save(figure, path)
