"""The picture of the loss curve of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_TRAIN, _VALIDATION, _INK = "#7aa6c2", "#c8553d", "#333333"


def plot_loss(
    path: Path,
    train: Sequence[tuple[int, float]],
    validation: Sequence[tuple[int, float]],
    title: str,
) -> None:
    """Draw training and validation bits per byte against steps and save the picture.

    Args:
        path: the picture, e.g. loss.png.
        train: (step, bits per byte) of every logged loss; a thin line, with the running mean as a thick line.
        validation: (step, bits per byte) of every validation.
        title: title of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if train:
        steps, values = zip(*train, strict=True)
        axes.plot(steps, values, color=_TRAIN, linewidth=0.8, alpha=0.5)
        axes.plot(steps, _running_mean(values), color=_TRAIN, linewidth=2, label="training")
    if validation:
        steps, values = zip(*validation, strict=True)
        axes.plot(steps, values, color=_VALIDATION, linewidth=1.5, marker="o", markersize=4, label="validation")
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("bits per byte", color=_INK)
    axes.set_title(title, loc="left", color=_INK, fontsize=11)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)
    if train or validation:
        axes.legend(frameon=False)
    figure.savefig(path)


def _running_mean(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Mean over a window around each value; the window is about `share` of the curve.

    Near the start the window is smaller and symmetric. Near the end it is cut off at the last value.
    """
    half = int(share * len(values) / 2)
    smooth = []
    for index in range(len(values)):
        window = values[max(0, index - half) : index + min(half, index) + 1]
        smooth.append(sum(window) / len(window))
    return smooth
