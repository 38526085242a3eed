"""The section of the experiment `numerics` on the page: tables, text and picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .picture import draw_band, new_panels, save
from .table import markdown_table, spread

Entries = list[dict[str, Any]]
_COLOURS = ("#9c9c9c", "#b8860b", "#2a9d8f", "#7aa6c2", "#1d3557", "#c8553d")
_STYLES = {"float32": "-", "bfloat16": "--"}


def values(entries: Entries, at: int | None, of: str = "error", **wanted: Any) -> list[float | None]:
    """The results of all seeds in the matching cells, after `at` products or tokens (None: the last)."""
    found = []
    for entry in entries:
        if wanted.items() <= entry["cell"].items():
            result = entry["result"]
            steps = list(result.get("products") or result["tokens"])
            found.append(result[of][len(steps) - 1 if at is None else steps.index(at)])
    return found


def text_of(entries: Entries, solvers: Sequence[str], methods: Sequence[str]) -> str:
    """The tables and the text about them."""

    def line(solver: str, dtype: str) -> list[str]:
        wanted = {"solver": solver, "dtype": dtype}
        cells = [spread(values(entries, n, of, part="iterations", **wanted)) for n, of in _COLUMNS]
        return [
            solver,
            dtype,
            *cells,
            *(spread(values(entries, 30, part="gradients", layers=n, **wanted)) for n in (1, 5)),
        ]

    errors = [line(solver, dtype) for solver in solvers for dtype in _STYLES]
    strengths = sorted({e["cell"]["ridge_ratio"] for e in entries if e["cell"]["part"] == "strengths"})
    by_ridge = [
        [
            f"{a:g}",
            dtype,
            *(spread(values(entries, n, part="strengths", ridge_ratio=a, dtype=dtype)) for n in (10, 20, 30)),
        ]
        for a in strengths
        for dtype in _STYLES
    ]
    readout = [[method, spread(values(entries, None, part="recursion", method=method))] for method in methods]
    tokens = max(e["cell"]["tokens"] for e in entries)
    head = ["solver", "products in", *(f"{_NAMES[of]}, {n} products" for n, of in _COLUMNS)]
    return "\n\n".join(
        (
            "How exact are the solvers? The table has the relative residual ||Ax - q|| / ||q||, the relative "
            "error of x, and the relative error of all gradients. The comparison is an exact solve in float64. "
            "a is 0.02. The head dim D is 128, and 32 for the gradients. Each cell has the median of the seeds, "
            "with the least and the largest in brackets.",
            markdown_table([*head, "gradients, 1 layer, 30", "gradients, 5 layers, 30"], errors),
            "Error of x with Chebyshev nodes, for other ridge ratios:",
            markdown_table(["a", "products in", "10 products", "20 products", "30 products"], by_ridge),
            f"Error of the readout in the last {_WINDOW} of {tokens} tokens, without decay:",
            markdown_table(["method", "error"], readout),
            "The Kalman recursion runs entirely in its dtype, with a ridge of 0.25. In the layer's solve only the "
            "products are rounded, and its ridge is a ||S||. D is 64. Each method is compared with its own exact "
            "answer.",
            *_retention(entries),
            _findings(entries),
        )
    )


def _retention(entries: Entries) -> list[str]:
    """The retention of a value, by ridge, gate and lag."""
    kept = [entry for entry in entries if entry["cell"]["part"] == "retention"]
    if not kept:
        return []
    groups: dict[tuple[float, float | None], list[dict[str, Any]]] = {}
    for entry in kept:
        groups.setdefault((entry["cell"]["log_gate"], entry["cell"]["ridge_ratio"]), []).append(entry["result"])
    lags = kept[0]["result"]["lags"]
    rows = [
        [
            f"{g:g}",
            "no solve" if a is None else f"{a:g}",
            *(f"{statistics.median(result['cosine'][n] for result in found):.3f}" for n in range(len(lags))),
        ]
        for (g, a), found in sorted(groups.items(), key=lambda item: (-item[0][0], item[0][1] or math.inf))
    ]
    return [
        "Retention: how well does the layer remember a value? The table has the cosine between the value of a "
        "token and a later readout with its key. Keys and values are random (normal), D is 64, alpha is 1, "
        f"the sequence has {kept[0]['cell']['tokens']} tokens. Median of the seeds:",
        markdown_table(["log-gate", "a", *(f"{lag} later" for lag in lags)], rows),
    ]


_NAMES = {"residual": "residual", "error": "error of x"}
_COLUMNS = ((30, "residual"), (10, "error"), (30, "error"))
_WINDOW = 16


def _findings(entries: Entries) -> str:
    """A paragraph that compares with the figures of the paper, once all cells are measured."""
    if not {"iterations", "gradients", "recursion"} <= {entry["cell"]["part"] for entry in entries}:
        return ""

    def middle(at: int | None, **wanted: Any) -> str:
        found = [math.nan if x is None else x for x in values(entries, at, **wanted)]
        return f"{statistics.median(found):.1e}" if found else "(not measured)"

    def gradients(solver: str, dtype: str) -> str:
        one, five = (middle(30, part="gradients", layers=n, solver=solver, dtype=dtype) for n in (1, 5))
        return f"{one} and {five}"

    cg, refined = "conjugate gradient", "Chebyshev, nodes, refined"
    three_term, nodes, by_cg, by_refined = (
        middle(30, part="iterations", solver=name, dtype="bfloat16")
        for name in ("Chebyshev, three-term", "Chebyshev, nodes", cg, refined)
    )
    kalman = values(entries, None, part="recursion", method="Kalman recursion in bfloat16")
    plain = "Chebyshev, nodes"
    return (
        "Compared with the paper's figure 1: with bfloat16 products the error of x after 30 products is "
        f"{three_term} (three-term), {nodes} (nodes) and {by_cg} (conjugate gradient). With one refinement, whose "
        f"residual is not rounded, it is {by_refined}. Errors of the gradients in one layer and in five layers, "
        f"float32: conjugate gradient {gradients(cg, 'float32')}, nodes {gradients(plain, 'float32')}, refined "
        f"nodes {gradients(refined, 'float32')}. bfloat16, in the same order: {gradients(cg, 'bfloat16')}, "
        f"{gradients(plain, 'bfloat16')}, {gradients(refined, 'bfloat16')}. In the paper's figure the gradients "
        "of conjugate gradient are wrong. Here they are correct: the same solver also solves the adjoint "
        f"system. These blocks are small and untrained, with {_gradient_tokens(entries)} tokens. The classical "
        f"Kalman recursion in bfloat16 has an error of {spread(kalman)} at the end. This experiment does not "
        "measure the effect of the ridge on a language model's loss, which is the paper's figure 8."
    )


def _gradient_tokens(entries: Entries) -> int:
    return int(next(e["cell"]["tokens"] for e in entries if e["cell"]["part"] == "gradients"))


def picture_of(entries: Entries, solvers: Sequence[str], methods: Sequence[str], path: Path) -> None:
    """Six panels: residual, error, ridge ratios, recursion, gradients of one layer and of five layers."""
    figure, panels = new_panels(2, 3, (15, 8.5), 110)
    by_solver = {name: {"solver": name} for name in solvers}
    ridges = sorted({e["cell"]["ridge_ratio"] for e in entries if e["cell"]["part"] == "strengths"})
    by_ridge = {f"a = {a:g}": {"ridge_ratio": a} for a in ridges}
    for axes, title, of, lines, wanted in (
        (panels[0], "Residual", "residual", by_solver, {"part": "iterations"}),
        (panels[1], "Error of the solution x", "error", by_solver, {"part": "iterations"}),
        (panels[2], "Error of x with Chebyshev nodes", "error", by_ridge, {"part": "strengths"}),
        (panels[4], "Error of the gradients, one layer", "error", by_solver, {"part": "gradients", "layers": 1}),
        (panels[5], "Error of the gradients, five layers", "error", by_solver, {"part": "gradients", "layers": 5}),
    ):
        for (name, line), colour in zip(lines.items(), _COLOURS, strict=False):
            for dtype, style in _STYLES.items():
                _band(axes, entries, of, {**wanted, **line, "dtype": dtype}, style, colour, name)
        axes.set_ylim(1e-7, 3)
        axes.set_xlabel("products with S (solid: float32, dashed: bfloat16)")
        axes.set_title(title, loc="left", fontsize=11)
    for method, colour in zip(methods, ("#7aa6c2", "#8b1e3f", "#1d3557", "#c8553d"), strict=True):
        _band(panels[3], entries, "error", {"part": "recursion", "method": method}, "-", colour, method)
    panels[3].set_xlabel("token")
    panels[3].set_title("Error of the readout along the sequence", loc="left", fontsize=11)
    for axes in panels:
        axes.set_yscale("log")
        axes.set_ylabel("relative error" if axes is not panels[0] else "||Ax - q|| / ||q||")
    panels[2].legend(fontsize=8, frameon=False, loc="upper right")
    panels[3].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(0.02, 0.32))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    save(figure, path)


def _band(
    axes: Any, entries: Entries, of: str, wanted: dict[str, Any], style: str, colour: str, name: str
) -> None:
    """The median of the seeds, and a band from the smallest to the largest value."""
    found = [entry["result"] for entry in entries if wanted.items() <= entry["cell"].items()]
    if not found:
        return
    x = found[0].get("products") or found[0]["tokens"]
    columns = [
        [math.nan if result[of][n] is None else max(result[of][n], 1e-16) for result in found]
        for n in range(len(x))
    ]
    label = name if style == "-" else None
    draw_band(axes, x, columns, colour, linestyle=style, label=label, linewidth=1.6)
