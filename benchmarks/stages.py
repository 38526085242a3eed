"""Time and floor of each kernel of the op in one call, with a picture.

The floor of a kernel is the longer of two times: its bytes at BANDWIDTH, the speed of a copy, and its products at
RATE, the speed of a large bfloat16 matrix product on this GPU. Bytes are counted as if nothing stays in a cache.

Legend: B batch, T time, H heads, D = V head dims, C tokens of a chunk; a token-head is one token of one head.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.calls import gpu_seconds

BANDWIDTH = {"H200": 4.2e12, "H100": 3.0e12}  # bytes per second of a copy, read and written, by GPU
RATE = 790e12  # flops per second, on both GPUs
C = 64
# In the order in which they run. Of a token-head in bfloat16: rows of D numbers that are read and written (2 D
# bytes each; float32 counts twice, a pair in three bytes 1.5 times), D x D matrices per chunk, counted alike, and
# products with S and K together (of the solve).
KERNELS: dict[str, tuple[float, float, float]] = {
    "scan_states": (3 * 2, 3.5 + 3.5, 0),  # three times: sums of spans, forwards, backwards
    "solve_chunks": (3.5 + 6, 2 * 2, 68.6),  # twice 30 products and a residual; norms, and one more of the adjoint
    "read_states": (5.5, 1.5, 0),
    "read_gradients": (5, 1.5, 0),
    "query_gradients": (7, 0, 0),
    "increments_kk": (4, 1.5, 0),
    "increments_kv": (3.5, 1.5, 0),
    "scan_gradients": (0, 8, 0),
    "value_gradients": (10, 1.5, 0),
    "key_gradients": (8, 4, 0),
}


def bandwidth(gpu: str) -> float:
    """Bytes per second of a GPU by its name; for unknown GPUs that of the H200, so that floors are low."""
    return next((rate for name, rate in BANDWIDTH.items() if name in gpu), max(BANDWIDTH.values()))


def floor(kernel: str, B: int, T: int, H: int, D: int, gpu: str = "H200") -> float:
    """The floor of a kernel in seconds, for forward + backward with steps (16, 16) in bfloat16."""
    rows, matrices, products = KERNELS[kernel]
    of_a_token = rows * 2 * D + matrices * 2 * D * D / C
    flops = products * (2 * D * D + 4 * C * D)
    return B * T * H * max(of_a_token / bandwidth(gpu), flops / RATE)


def seconds_by_kernel(function: Callable[[], object]) -> dict[str, float]:
    """Seconds on the GPU for every kernel of KERNELS in one profiled call, and for all others as "rest"."""
    found = dict.fromkeys((*KERNELS, "rest"), 0.0)
    for name, time in gpu_seconds(function).items():
        found[name if name in KERNELS else "rest"] += time
    return found


def plot(result: Path) -> Path | None:
    """Draw a bar for every kernel of the first row with kernels in a JSON file; save the picture next to it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    content: dict[str, Any] = json.loads(result.read_text())
    row = next((row for row in content["rows"] if row.get("kernels")), None)
    if row is None:
        return None
    names = [name for name in reversed(KERNELS) if name in row["kernels"]]
    measured = [row["kernels"][name] * 1e3 for name in names]
    gpu = content["machine"]["gpu"] or ""
    floors = [floor(name, row["B"], row["T"], row["H"], row["D"], gpu) * 1e3 for name in names]
    figure = Figure(figsize=(9, 4.6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh(names, measured, color="#7aa6c2", height=0.65, label="measured")
    axes.barh(names, floors, color="#1d3557", height=0.25, label="floor")
    for place, (time, least) in enumerate(zip(measured, floors, strict=True)):
        axes.text(time, place, f"  {time:.2f} ({least:.2f})", va="center", fontsize=8)
    axes.set_xlabel("milliseconds, all launches of a kernel together")
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.16)
    axes.legend(frameon=False, loc="lower right")
    machine = content["machine"]
    axes.set_title(
        f"Kernels of {row['op']}, {row['what'].replace('+', ' + ')}: B {row['B']}, T {row['T']:,}, H {row['H']}, "
        f"D = V = {row['D']}, {machine['gpu'] or machine['processor']}",
        loc="left", fontsize=10,
    )  # fmt: skip
    picture = result.with_suffix(".png")
    figure.savefig(picture)
    print(f"written: {picture}")
    return picture
