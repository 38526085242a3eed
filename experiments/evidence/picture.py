"""Pictures for the page: figures without a window, in one style, saved as PNG."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def new_panels(
    rows: int, columns: int, size: tuple[float, float], dpi: int, **options: Any
) -> tuple[Any, list[Any]]:
    """A figure of `size` inches, and its axes row by row; `options` go to matplotlib's `subplots`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axes in panels:
        axes.grid(color="#e5e5e5", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def draw_band(
    axes: Any,
    x: Sequence[float],
    columns: Sequence[Sequence[float]],
    colour: str,
    middle: Callable[[Sequence[float]], float] = statistics.median,
    **line: Any,
) -> None:
    """Draw the middle of the values at each x as a line, and a band from the smallest to the largest value.

    Args:
        columns: the values at each x.
        middle: function that gives the middle of a column, e.g. the median.
        line: options of matplotlib's `plot`.
    """
    axes.plot(x, [middle(column) for column in columns], color=colour, **line)
    axes.fill_between(x, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.15, linewidth=0)


def save(figure: Any, path: Path) -> None:
    """Write the PNG; create the folder if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
