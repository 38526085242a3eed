"""Tables in markdown, and numbers with their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def spread(values: Sequence[float | None], form: str = ".1e") -> str:
    """The median, and with several values the smallest and the largest. None and NaN count as not finite."""
    if not values:
        return ""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) < len(values):
        lost = len(values) - len(finite)
        return "not finite" if not finite else f"not finite in {lost} of {len(values)}"
    middle = f"{statistics.median(finite):{form}}"
    return middle if len(finite) == 1 else f"{middle} ({min(finite):{form}} to {max(finite):{form}})"


def span(counts: list[int]) -> str:
    """The first and the last of sorted counts, or one number if there is only one."""
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
