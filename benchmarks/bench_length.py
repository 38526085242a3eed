"""The part `length` of bench_ops: time of the op against T, up to a million tokens, with a picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.calls import forward, make_inputs, op_peers, with_gradients, without_gradients
from benchmarks.common import medians
from experiments.evidence.timing import seconds

HEADS, DIM, STEPS = 8, 128, (16, 16)
SLOW, FEW = 1.0, 2  # a call that takes more than SLOW seconds is repeated FEW times
WHATS = ("forward", "forward+backward")
LINES = {f"gka {STEPS}": "#c8553d", "Gated DeltaNet": "#1d3557", "SDPA, causal": "#7aa6c2"}


def bench_length(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows for every length, pass and op. An op slower than --limit is not run at greater lengths."""
    peers, note = op_peers(options.device)
    ops = {f"gka {STEPS}": partial(forward, solver_steps=STEPS)} | {n: f for n, f in peers.items() if n in LINES}
    last: dict[tuple[str, str], float | None] = {}
    T, longest = options.least_tokens, options.most_tokens
    if "Gated DeltaNet" in ops:  # its autotuning happens in the first call, so the first call has a typical length
        with suppress(torch.OutOfMemoryError):
            inputs = make_inputs(min(longest, 2**16), HEADS, DIM, torch.bfloat16, options.device)
            with_gradients(ops["Gated DeltaNet"], inputs)()
    while T <= longest:
        inputs = make_inputs(T, HEADS, DIM, torch.bfloat16, options.device)
        size = {"B": 1, "T": T, "H": HEADS, "D": DIM, "V": DIM, "dtype": "bfloat16"}
        for what, wrap in zip(WHATS, (without_gradients, with_gradients), strict=True):
            if what == "forward+backward" and T > options.most_tokens_backward:
                continue
            calls = {name: wrap(function, inputs) for name, function in ops.items()}
            times, skipped = _times(what, calls, last, options)
            for name in ops:
                row = {"part": "length", "what": what, "op": name, **size, "seconds": times.get(name)}
                notes = [note] if note and name == "Gated DeltaNet" and name in times else []
                notes += [skipped[name]] if name in skipped else []
                shown = f"{times[name]['median'] * 1e3:10.3f} ms" if name in times else skipped[name]
                print(f"length  T {T:7d} {what:17s} {name:15s} {shown}", flush=True)
                yield row | ({"note": "; ".join(notes)} if notes else {})
        T *= 2


def _times(
    what: str,
    calls: dict[str, Callable[[], object]],
    last: dict[tuple[str, str], float | None],
    options: argparse.Namespace,
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Times by op, and the reasons why other ops were not run. Updates `last`; None means out of memory."""
    skipped: dict[str, str] = {}
    quick: dict[str, Callable[[], object]] = {}
    slow: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        before = last.get((what, name), 0.0)
        if before is None or before > options.limit:
            reason = "out of memory" if before is None else f"{before:.1f} s"
            skipped[name] = f"not run: {reason} at a smaller length, limit {options.limit:g} s"
            continue
        try:
            call()  # compilation
            (slow if seconds(call, options.device) > SLOW else quick)[name] = call
        except torch.OutOfMemoryError:
            last[what, name], skipped[name] = None, "out of memory"
    times = medians(quick, options.device, options.repeats) | medians(slow, options.device, FEW)
    for name, time in times.items():
        last[what, name] = time["median"]
    return times, skipped


def tokens(T: int) -> str:
    """2048 -> 2K, 1048576 -> 1M."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if T >= size and T % size == 0:
            return f"{T // size}{letter}"
    return str(T)


def plot(result: Path) -> Path:
    """Draw two panels, forward and forward + backward, from a JSON file; save the picture next to the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    content = json.loads(result.read_text())
    rows = [row for row in content["rows"] if row["part"] == "length"]
    figure = Figure(figsize=(11, 4.8), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, what in zip(figure.subplots(1, 2), WHATS, strict=True):
        lengths = sorted({row["T"] for row in rows if row["what"] == what})
        for name, colour in LINES.items():
            points = [row for row in rows if (row["what"], row["op"]) == (what, name) and row["seconds"]]
            x, y = [row["T"] for row in points], [row["seconds"]["median"] * 1e3 for row in points]
            if points:
                axes.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.8, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(round(value))))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("tokens")
        axes.set_ylabel("milliseconds")
        axes.set_title(what.replace("+", " + "), loc="left", fontsize=11)
        axes.grid(color="#e5e5e5", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    first, machine = rows[0], content["machine"]
    shape = f"B {first['B']}, H {first['H']}, D = V = {first['D']}, {first['dtype']}"
    figure.suptitle(f"Time of the op: {shape}, {machine['gpu'] or machine['processor']}", fontsize=11)
    picture = result.with_suffix(".png")
    figure.savefig(picture)
    print(f"written: {picture}")
    return picture
