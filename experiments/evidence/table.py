"""Tables in markdown, numbers with their spread, and paired differences."""

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


def paired(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Nats per token of theirs minus ours, and its standard error, from windows [nats, tokens] of the same text.

    The difference is a ratio of sums. Its error is that of a ratio estimator: the spread over the windows of
    what a window adds to the difference beyond its share of tokens; infinite for one window.
    """
    apart = [b - a for (a, _), (b, _) in zip(ours, theirs, strict=True)]
    counts = [count for _, count in ours]
    total, n = sum(counts), len(counts)
    mean = sum(apart) / total
    if n < 2:
        return mean, math.inf
    squares = sum((each - mean * count) ** 2 for each, count in zip(apart, counts, strict=True))
    return mean, math.sqrt(squares * n / (n - 1)) / total
