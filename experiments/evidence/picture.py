"""Pictures of the page: a figure without a window, its axes and bands in one style, saved as PNG."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def new_panels(
    rows: int, columns: int, size: tuple[float, float], dpi: int, **options: Any
) -> tuple[Any, list[Any]]:
    """A figure of `size` inches, and its axes row by row; options are those of matplotlib's `subplots`."""
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
    """The middle of the values at each x as a line, in a band from the least to the largest.

    Args:
        columns: the values at each x. middle: of a column. line: options of matplotlib's `plot`.
    """
    axes.plot(x, [middle(column) for column in columns], color=colour, **line)
    axes.fill_between(x, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.15, linewidth=0)


def save(figure: Any, path: Path) -> None:
    """Write the PNG, and the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
