"""How exactly the solvers solve, and what that does to gradients (the paper's figure 1, remade).

    python -m benchmarks.bench_numerics            # about 2 minutes on one core

iterations: error of x against the exact solution after n products, for gradient descent, gradient descent
    with momentum, conjugate gradient and Chebyshev iteration (three-term, nodes, nodes with refinement), with
    products in float32 and in bfloat16; on the systems that T tokens of an input family meet.
recursion: error of the readout against tokens for the classical Kalman recursion in bfloat16 and float32,
    beside the layer's own solve, each against its own exact answer.
gradients: error of all parameter gradients against those of the exact solver, for one layer and for five
    stacked ones, after n products.

Vectors and sums are float64 throughout, so that only what is named is rounded: `product dtype` rounds both
factors of every product with S, the residuals of refinement excepted. The Kalman recursion runs in its dtype
as a whole.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import write_result
from gka.ops.reference import gated_kalmanet, kalman_filter, ridge_regression
from gka.ops.solvers import RIDGE_RATIO, Chebyshev, ConjugateGradient, Exact, GradientDescent, Solver

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRODUCTS = (1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 60)
Rows = list[dict[str, Any]]


def _halves(nodes: int) -> tuple[int, ...]:
    return (nodes - nodes // 2, nodes // 2) if nodes > 1 else (nodes,)


# From the number of products with S to a solver. The first step from zero needs no product; the residual of
# the refinement is one more, and the second stage's first step needs none: n products make n + 1 nodes.
SOLVERS: dict[str, Callable[[int, torch.dtype], Solver]] = {
    "gradient descent": lambda n, dtype: GradientDescent(n + 1, product_dtype=dtype),
    "gradient descent, momentum": lambda n, dtype: GradientDescent(n + 1, momentum=True, product_dtype=dtype),
    "conjugate gradient": lambda n, dtype: ConjugateGradient(n, product_dtype=dtype),
    "Chebyshev, three-term": lambda n, dtype: Chebyshev((n + 1,), "three_term", dtype),
    "Chebyshev, nodes": lambda n, dtype: Chebyshev((n + 1,), "nodes", dtype),
    "Chebyshev, nodes, refined": lambda n, dtype: Chebyshev(_halves(n + 1), "nodes", dtype),
}


def relative_error(out: Tensor, ref: Tensor) -> float:
    return ((out - ref).norm() / ref.norm()).item()


def token_inputs(T: int, D: int, m: float = 4.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [1, T, 1, D] and g [1, T, 1] of the family "correlated keys", rounded to bfloat16, in float64."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, T, 1, D, dtype=torch.float64) for _ in range(3))
    q, k = q + torch.randn(1, 1, 1, D, dtype=torch.float64), k + torch.randn(1, 1, 1, D, dtype=torch.float64)
    q, k = (nn.functional.normalize(x, dim=-1) for x in (q, k))
    g = nn.functional.logsigmoid(torch.randn(1, T, 1, dtype=torch.float64) + m)
    q, k, v = (x.bfloat16().double() for x in (q, k, v))
    return q, k, v, g


def systems(q: Tensor, k: Tensor, g: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """S_hat [n, D, D] of norm 1 and q [n, D] of every `every`-th token."""
    S = torch.zeros(q.shape[-1], q.shape[-1], dtype=torch.float64)
    kept: list[Tensor] = []
    for t in range(q.shape[1]):
        S = g[0, t, 0].exp() * S + torch.outer(k[0, t, 0], k[0, t, 0])
        if t % every == every - 1:
            kept.append(S / S.norm())
    return torch.stack(kept), q[0, every - 1 :: every, 0]


def bench_iterations(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    q, k, _, g = token_inputs(options.tokens, 128)
    S, rhs = systems(q, k, g, 8)
    exact = Exact().solve(S, rhs, RIDGE_RATIO)
    for name, make in SOLVERS.items():
        for dtype_name, dtype in DTYPES.items():
            for n in PRODUCTS:
                solver = make(n, dtype)
                error = relative_error(solver.solve(S, rhs, RIDGE_RATIO), exact)
                bound = solver.error_bound(RIDGE_RATIO)
                yield {"solver": name, "dtype": dtype_name, "products": n, "error": error, "bound": bound}


def bench_recursion(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    q, k, v, g = token_inputs(options.tokens, 64)
    no_decay, ridge = torch.zeros_like(g), 0.25
    W = ridge_regression(k, v, no_decay, ridge)
    exact = (q.unsqueeze(-2) @ W).squeeze(-2)
    outputs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, dtype in DTYPES.items():
        filtered = kalman_filter(k.to(dtype), v.to(dtype), no_decay.to(dtype), ridge).double()
        outputs[f"Kalman recursion in {name}"] = ((q.unsqueeze(-2) @ filtered).squeeze(-2), exact)

    def layer(solver: Solver) -> Tensor:
        return gated_kalmanet(
            q, k, v, no_decay, None, None, ridge_ratio=RIDGE_RATIO, steps=None, scale=1.0, initial_state=None,
            output_final_state=False, cu_seqlens=None, normalize_qk=False, solver=solver,
        )[0]  # fmt: skip

    own = layer(Exact())
    outputs["Chebyshev (31,), bfloat16 products"] = (layer(Chebyshev((31,), "nodes", torch.bfloat16)), own)
    outputs["Chebyshev (16, 16), bfloat16 products"] = (layer(Chebyshev((16, 16), "nodes", torch.bfloat16)), own)
    for name, (out, ref) in outputs.items():
        error = (out - ref).norm(dim=-1)[0, :, 0] / ref.norm(dim=-1)[0, :, 0]
        window = error.unfold(0, 16, 16).mean(-1)
        for number, value in enumerate(window.tolist()):
            yield {"method": name, "token": 16 * (number + 1), "error": value if math.isfinite(value) else None}


class Block(nn.Module):
    """x + W_o GKA(RMSNorm(x) W_q, .. W_k, .. W_v), the smallest residual block with the op in it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projections = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, g: Tensor, solver: Solver) -> Tensor:
        normed = nn.functional.rms_norm(x, x.shape[-1:])
        q, k, v = (linear(normed).unflatten(-1, (self.heads, -1)) for linear in self.projections[:3])
        q, k = (nn.functional.normalize(nn.functional.silu(y), dim=-1) for y in (q, k))
        o, _ = gated_kalmanet(
            q, k, v, g, None, None, ridge_ratio=RIDGE_RATIO, steps=None, scale=1.0, initial_state=None,
            output_final_state=False, cu_seqlens=None, normalize_qk=False, solver=solver,
        )  # fmt: skip
        return x + self.projections[3](nn.functional.rms_norm(o, o.shape[-1:]).flatten(-2))


def bench_gradients(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    width, heads, T = 64, 2, 32
    blocks = nn.ModuleList(Block(width, heads) for _ in range(5)).double()
    x, target = torch.randn(2, 1, T, width, dtype=torch.float64).unbind(0)
    g = nn.functional.logsigmoid(torch.randn(1, T, heads, dtype=torch.float64) + 4)

    def gradient(layers: int, solver: Solver) -> Tensor:
        hidden = x
        for block in blocks[:layers]:
            hidden = block(hidden, g, solver)
        loss = (hidden * target).sum()
        return torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(blocks[:layers].parameters()))])

    for layers in (1, 5):
        exact = gradient(layers, Exact())
        for name, make in SOLVERS.items():
            for dtype_name, dtype in DTYPES.items():
                for n in (5, 10, 15, 20, 30):
                    error = relative_error(gradient(layers, make(n, dtype)), exact)
                    yield {"solver": name, "dtype": dtype_name, "layers": layers, "products": n, "error": error}


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "iterations": bench_iterations,
    "recursion": bench_recursion,
    "gradients": bench_gradients,
}

COLOURS = dict(zip(SOLVERS, ("#9c9c9c", "#b8860b", "#2a9d8f", "#7aa6c2", "#1d3557", "#c8553d"), strict=True))
STYLES = {"float32": "-", "bfloat16": "--"}


def plot(rows: Rows, path: Path) -> None:
    """Four panels: iterations, the recursion, gradients of one layer and of five."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2).flat
    for axes, (title, wanted) in zip(
        (panels[0], panels[2], panels[3]),
        (
            ("Error of the solution x", {"part": "iterations"}),
            ("Error of the gradients, one layer", {"part": "gradients", "layers": 1}),
            ("Error of the gradients, five layers", {"part": "gradients", "layers": 5}),
        ),
        strict=True,
    ):
        for name, colour in COLOURS.items():
            for dtype, style in STYLES.items():
                line = {**wanted, "solver": name, "dtype": dtype}
                points = [row for row in rows if line.items() <= row.items()]
                label = name if dtype == "float32" else None
                x, y = [row["products"] for row in points], [row["error"] for row in points]
                axes.plot(x, y, style, color=colour, label=label, linewidth=1.6)
        axes.set_yscale("log")
        axes.set_ylim(1e-7, 3)
        axes.set_xlabel("products with S (solid: float32, dashed: bfloat16)")
        axes.set_title(title, loc="left", fontsize=11)
    panels[0].legend(fontsize=8, loc="lower left", framealpha=0.95, edgecolor="none")
    recursion = [row for row in rows if row["part"] == "recursion"]
    colours = ("#7aa6c2", "#8b1e3f", "#1d3557", "#c8553d")
    for name, colour in zip(dict.fromkeys(row["method"] for row in recursion), colours, strict=True):
        points = [row for row in recursion if row["method"] == name]
        errors = [math.nan if row["error"] is None else row["error"] for row in points]
        panels[1].plot([row["token"] for row in points], errors, color=colour, label=name, linewidth=1.6)
    panels[1].set_yscale("log")
    panels[1].set_xlabel("token")
    panels[1].set_title("Error of the readout along the sequence", loc="left", fontsize=11)
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(0.02, 0.32))
    for axes in panels:
        axes.set_ylabel("relative error")
        axes.grid(color="#e5e5e5", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    print(f"written: {path}")


def table(rows: Rows) -> str:
    """Errors after 10 and 30 products, per solver and dtype, and the recursion's last error."""
    lines = [f"{'':28s}{'dtype':10s}{'x, 10':>10s}{'x, 30':>10s}{'1 layer, 30':>13s}{'5 layers, 30':>14s}"]
    for name in SOLVERS:
        for dtype in DTYPES:
            line = {"solver": name, "dtype": dtype}

            def error(line: dict[str, Any] = line, **wanted: Any) -> float:
                found = {**line, **wanted}
                return next(float(row["error"]) for row in rows if found.items() <= row.items())

            values = [error(part="iterations", products=n) for n in (10, 30)]
            values += [error(part="gradients", layers=n, products=30) for n in (1, 5)]
            lines.append(
                f"{name:28s}{dtype:10s}{values[0]:10.1e}{values[1]:10.1e}{values[2]:13.1e}{values[3]:14.1e}"
            )
    for name in dict.fromkeys(row["method"] for row in rows if row["part"] == "recursion"):
        last = [row for row in rows if row.get("method") == name][-1]
        value = "not finite" if last["error"] is None else f"{last['error']:.1e}"
        lines.append(f"{name:38s} error of the readout at token {last['token']}: {value}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_numerics",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=512, help="T of the parts iterations and recursion")
    parser.add_argument("--output", type=Path, help="JSON file; the picture stands beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    rows = [{"part": part, **row} for part, bench in PARTS.items() for row in bench(options)]
    print(table(rows))
    command = " ".join(["python -m benchmarks.bench_numerics", *sys.argv[1:]])
    path = write_result("numerics", rows, command, options.output)
    plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
