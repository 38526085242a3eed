"""Draw the pictures of docs/how.md (state, spectrum, convergence), docs/architecture.md and docs/parallel.md.

    python -m benchmarks.pictures                  # a few seconds on one core; writes docs/images/*.png

state: S_kk after some tokens of a sequence, without and with decay. The keys change their subject half-way.
spectrum: eigenvalues of S_hat = S_kk / ||S_kk||_F, without and with the ridge a, on the systems of
    `python -m experiments evidence numerics`.
convergence: on the same systems, the error after each step in float32, with the nodes in the order of `node_steps`
    and in increasing order; and the error of the solve against the number of products in bfloat16, with one stage
    and with two stages, compared with the bound.
layers: the packages; each is drawn above the packages that it imports.
ranks: what travels between processes that share a sequence, for a GKA layer and for softmax attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor

from experiments.evidence.numerics import systems, token_inputs
from gka.ops import gated_kalmanet
from gka.ops.solvers import RIDGE_RATIO, Chebyshev, Exact, node_steps

FOLDER = Path(__file__).parent.parent / "docs" / "images"
_BLUE, _RED, _GREY, _INK = "#2f6f9f", "#c8553d", "#9a9a9a", "#333333"
LAYERS = (  # from the top: package, what it has, what it needs besides PyTorch; | between packages of one layer
    ("experiments", "tasks, evidence, other mixers; not in the wheel", ""),
    ("gka.cli", "the commands: train, generate, eval, convert, serve, ...", ""),
    ("gka.training", "Trainer, learning rate, data, distillation", "extra train"),
    ("gka.distributed | gka.vllm", "several GPUs | models in vLLM", "extra hf | extra vllm"),
    ("gka.hf", "configuration, models, checkpoints, conversion", "transformers: extra hf"),
    ("gka.nn", "GatedKalmaNet: projections, convolutions, gates, norm", "PyTorch alone"),
    ("gka.ops", "gated_kalmanet(): checks, choice of backend, gradients", "PyTorch alone"),
)
BACKENDS = (("reference", "float64 loop: the truth"), ("torch", "any device"), ("triton", "NVIDIA GPUs"))
RANKS, TOKENS_OF_A_RANK, RANK_WIDTH = 4, 10, 1.6  # as drawn
TOKENS = (4, 64, 68, 96, 128)
DECAYS = (0.0, -0.05)


def keys_of_two_subjects(T: int = 128, D: int = 16) -> Tensor:
    """Unit keys [1, T, 1, D] in float64: the first half mostly in the first D / 2 channels, then the others."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, T, 1, D, generator=generator, dtype=torch.float64)
    k[:, : T // 2, :, D // 2 :] *= 0.15
    k[:, T // 2 :, :, : D // 2] *= 0.15
    return torch.nn.functional.normalize(k, dim=-1)


def states(k: Tensor, g: float, tokens: Sequence[int] = TOKENS) -> list[Tensor]:
    """S_kk [D, D] after each number of tokens, with log-decay g at every token."""
    found = []
    for t in tokens:
        decays = torch.full((1, t, 1), g, dtype=torch.float64)
        _, state = gated_kalmanet(k[:, :t], k[:, :t], k[:, :t], decays, output_final_state=True)
        assert state is not None and state.S_kk is not None
        found.append(state.S_kk[0, 0])
    return found


def _relative(x: Tensor, exact: Tensor) -> float:
    """Mean over the systems of ||x - exact|| / ||exact||."""
    return ((x - exact).double().norm(dim=-1) / exact.double().norm(dim=-1)).mean().item()


def errors_by_step(S_hat: Tensor, q: Tensor, taus: Sequence[float]) -> list[float]:
    """Error of x after each step x <- x - tau (A x - q), in float32, against the exact solve in float64.

    Args:
        S_hat: [n, D, D]; q: [n, D]; float64.
        taus: step sizes, in the order of the steps.
    """
    exact = Exact().solve(S_hat, q, RIDGE_RATIO)
    matrix, rhs = S_hat.float(), q.float()
    x, errors = torch.zeros_like(rhs), []
    for tau in taus:
        product = (matrix @ x.unsqueeze(-1)).squeeze(-1)
        x = x - tau * (product + RIDGE_RATIO * x - rhs)
        errors.append(_relative(x, exact))
    return errors


def errors_by_products(S_hat: Tensor, q: Tensor, stages: int, products: Sequence[int]) -> list[float]:
    """Error of Chebyshev iteration with bfloat16 products; the n + 1 nodes are split evenly among the stages."""
    exact = Exact().solve(S_hat, q, RIDGE_RATIO)
    errors = []
    for n in products:
        solver_steps = tuple((n + 1 + stage) // stages for stage in range(stages))[::-1]
        x = Chebyshev(solver_steps, product_dtype=torch.bfloat16).solve(S_hat.float(), q.float(), RIDGE_RATIO)
        errors.append(_relative(x, exact))
    return errors


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: object, xlabel: str, ylabel: str, title: str) -> None:
    axes.set_xlabel(xlabel, color=_INK)  # type: ignore[attr-defined]
    axes.set_ylabel(ylabel, color=_INK)  # type: ignore[attr-defined]
    axes.set_title(title, loc="left", color=_INK, fontsize=10)  # type: ignore[attr-defined]
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)  # type: ignore[attr-defined]
    axes.set_axisbelow(True)  # type: ignore[attr-defined]
    axes.spines[["top", "right"]].set_visible(False)  # type: ignore[attr-defined]
    axes.legend(frameon=False, fontsize=8)  # type: ignore[attr-defined]


def draw_state() -> Figure:
    k = keys_of_two_subjects()
    figure = _figure(10, 4.4)
    grid = figure.subplots(len(DECAYS), len(TOKENS))
    for row, g in zip(grid, DECAYS, strict=True):
        matrices = states(k, g)
        limit = max(S.abs().max().item() for S in matrices)
        for axes, t, S in zip(row, TOKENS, matrices, strict=True):
            shown = axes.imshow(S, cmap="RdBu_r", vmin=-limit, vmax=limit)
            axes.set_title(f"{t} tokens", color=_INK, fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(f"g = {g:g}", color=_INK)
        figure.colorbar(shown, ax=list(row), shrink=0.85, pad=0.01)
    return figure


def draw_spectrum(S_hat: Tensor) -> Figure:
    S = S_hat[-1]
    values = torch.linalg.eigvalsh(S).flip(0)
    figure = _figure(7, 4)
    axes = figure.subplots()
    index = range(1, len(values) + 1)
    for shift, color, name in ((0.0, _GREY, "S_hat"), (RIDGE_RATIO, _BLUE, f"S_hat + a I, a = {RIDGE_RATIO}")):
        condition = ((values[0] + shift) / (values[-1] + shift)).item()
        label = f"{name}: largest / smallest {condition:.3g}"
        axes.semilogy(index, values + shift, ".-", color=color, label=label)
    bound = (1 + RIDGE_RATIO) / RIDGE_RATIO
    axes.axhspan(
        RIDGE_RATIO, 1 + RIDGE_RATIO, color=_BLUE, alpha=0.08, label=f"[a, 1 + a]: ratio {bound:.3g} at most"
    )
    _tidy(axes, "eigenvalue, from the largest", "size", "")
    return figure


def draw_convergence(S_hat: Tensor, q: Tensor) -> Figure:
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2)
    n = 32
    taus = node_steps(n, RIDGE_RATIO)
    orders = ((taus, _BLUE, "in the order of node_steps"), (sorted(taus), _RED, "small steps first"))
    for order, color, name in orders:
        left.semilogy(range(1, n + 1), errors_by_step(S_hat, q, order), ".-", color=color, label=name)
    _tidy(left, "step", "error of the iterate", f"One stage of {n} nodes, float32")
    products = list(range(1, 61, 2))
    lines: tuple[tuple[int, str, str], ...] = ((1, _RED, "one stage"), (2, _BLUE, "two stages: refined"))
    for stages, color, name in lines:
        right.semilogy(products, errors_by_products(S_hat, q, stages, products), ".-", color=color, label=name)
    bounds = [Chebyshev((count + 1,)).error_bound(RIDGE_RATIO) for count in products]
    right.semilogy(products, bounds, "--", color=_GREY, label="bound, one stage, exact arithmetic")
    _tidy(right, "products with S_hat", "error of x", "Products in bfloat16")
    return figure


def _box(axes: object, x: float, y: float, width: float, height: float, color: str) -> None:
    box = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=color, ec=_BLUE)
    axes.add_patch(box)  # type: ignore[attr-defined]


def draw_layers() -> Figure:
    figure = _figure(9, 7.2)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(0, 10)
    axes.set_ylim(-1.3, len(LAYERS))
    for number, layer in enumerate(LAYERS):
        y, packages = len(LAYERS) - number - 0.85, list(zip(*(text.split(" | ") for text in layer), strict=True))
        width = (9.9 - 0.1 * len(packages)) / len(packages)
        for place, (name, has, needs) in enumerate(packages):
            x = 0.1 + place * (width + 0.1)
            _box(axes, x, y, width, 0.7, "#f3f3f3" if name == "experiments" else "#e6eff6")
            axes.text(
                x + 0.2, y + 0.35, name, va="center", family="monospace", weight="bold", color=_INK, fontsize=11
            )
            axes.text(x + 2.2 - place * 0.7, y + 0.35, has, va="center", color=_INK, fontsize=10)
            axes.text(x + width - 0.2, y + 0.35, needs, va="center", ha="right", color="#666666", fontsize=9)
        axes.annotate("", (5, y - 0.3), (5, y), arrowprops={"arrowstyle": "-|>", "color": _BLUE})
    for number, (name, what) in enumerate(BACKENDS):
        x = 0.1 + 3.3 * number
        _box(axes, x, -1.2, 3.2, 1.0, "#ffffff")
        axes.text(
            x + 1.6, -0.5, f"gka.ops.{name}", ha="center", va="center", family="monospace", color=_INK, fontsize=10
        )
        axes.text(x + 1.6, -0.92, what, ha="center", va="center", color=_INK, fontsize=9)
    return figure


def received_megabytes(T: int, n: int = 8, H: int = 16, Hk: int = 16, D: int = 128) -> tuple[float, float]:
    """What a process receives, forward and backward together, in a GKA layer (contiguous layout) and in attention.

    T tokens of a sequence, n processes, H heads of dim D, Hk key/value heads; the formulas of docs/parallel.md.
    """
    sums, inputs = 4 * (n - 1) * H * (2 * D**2 + 1), 2 * (n - 1) * 3 * (H + 2 * Hk) * D
    keys_and_values = 2 * 2 * T * Hk * D * (n - 1) / n
    return 2e-6 * (sums + inputs), 2e-6 * keys_and_values


def _squares(axes: object, x: float, y: float, width: float, height: float, number: int, color: str) -> None:
    """A row of equal boxes."""
    for n in range(number):
        place = (x + n * width / number, y)
        axes.add_patch(Rectangle(place, width / number, height, fc=color, ec="white", lw=1))  # type: ignore[attr-defined]


def _arrow(axes: object, start: tuple[float, float], stop: tuple[float, float], color: str) -> None:
    axes.annotate("", stop, start, arrowprops={"arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0})  # type: ignore[attr-defined]


def _ranks(axes: object, name: str, sent: str, sizes: Sequence[str]) -> list[float]:
    """Ranks with their tokens, under a line that stands for the exchange; the left edges of the ranks."""
    axes.set_axis_off()  # type: ignore[attr-defined]
    axes.set_xlim(0, 11)  # type: ignore[attr-defined]
    axes.set_ylim(-0.55, 3.3)  # type: ignore[attr-defined]
    lefts = [2.75 + r * (RANK_WIDTH + 0.5) for r in range(RANKS)]
    axes.text(0, 2.65, name, weight="bold", color=_INK, fontsize=12, va="center")  # type: ignore[attr-defined]
    for line, text in enumerate(sizes):
        axes.text(0, 2.1 - 0.33 * line, text, color=_INK, fontsize=9, va="center")  # type: ignore[attr-defined]
    axes.text(lefts[0], 2.95, sent, color=_BLUE, fontsize=10, va="center")  # type: ignore[attr-defined]
    axes.plot([lefts[0], lefts[-1] + RANK_WIDTH], [2.65, 2.65], color=_BLUE, lw=2.5)  # type: ignore[attr-defined]
    for r, x in enumerate(lefts):
        _box(axes, x, 0, RANK_WIDTH, 0.85, "#e6eff6")
        axes.text(x + 0.1, 0.62, f"rank {r}", color=_INK, fontsize=10, va="center")  # type: ignore[attr-defined]
        _squares(axes, x + 0.1, 0.13, RANK_WIDTH - 0.2, 0.24, TOKENS_OF_A_RANK, _GREY)
        _arrow(axes, (x + 0.55, 0.87), (x + 0.55, 1.3), _BLUE)
        _arrow(axes, (x + 0.55, 2.15), (x + 0.55, 2.6), _BLUE)
        _arrow(axes, (x + RANK_WIDTH - 0.12, 2.6), (x + RANK_WIDTH - 0.12, 0.88), _BLUE)
    return lefts


def draw_ranks() -> Figure:
    figure = _figure(10.5, 6.6)
    gka, attention = figure.subplots(2, 1)
    short, long = 8_192, 1_048_576
    sizes = [[f"{T:,} tokens: {received_megabytes(T)[of]:,.0f} MB" for T in (short, long)] for of in (0, 1)]
    heading = ["One of 8 processes receives per layer", "and step, with 16 heads of 128:"]
    lefts = _ranks(
        gka, "GKA layer", "all-gather: the two sums of each process, to all processes", heading + sizes[0]
    )
    last = 3 * (RANK_WIDTH - 0.2) / TOKENS_OF_A_RANK
    for r, x in enumerate(lefts):
        for place, sums in ((x + 0.05, "kk"), (x + 0.6, "kv")):
            gka.add_patch(Rectangle((place, 1.35), 0.5, 0.75, fc=_BLUE, ec="white"))
            gka.text(place + 0.25, 1.72, f"$S_{{{sums}}}$", color="white", fontsize=11, ha="center", va="center")
        if r < RANKS - 1:
            _squares(gka, x + RANK_WIDTH - 0.1 - last, 0.13, last, 0.24, 3, _RED)
            _arrow(gka, (x + RANK_WIDTH - 0.1, 0.25), (lefts[r + 1], 0.25), _RED)
    gka.text(
        lefts[0],
        -0.3,
        "the last 3 inputs of the convolutions, for the next process",
        color=_RED,
        fontsize=10,
        va="center",
    )
    lefts = _ranks(
        attention,
        "Softmax attention",
        "all-gather: key k and value v of each token, to all processes",
        heading + sizes[1],
    )
    for x in lefts:
        for y, name in ((1.75, "k"), (1.35, "v")):
            _squares(attention, x + 0.05, y, 1.25, 0.36, TOKENS_OF_A_RANK, _BLUE)
            for n in range(TOKENS_OF_A_RANK):
                place = (x + 0.05 + (n + 0.5) * 1.25 / TOKENS_OF_A_RANK, y + 0.17)
                attention.text(*place, name, color="white", fontsize=8, ha="center", va="center")
    return figure


def main(folder: Path = FOLDER) -> None:
    q, k, _, g = token_inputs(512, 64)
    S_hat, rhs = systems(q, k, g, every=64)
    pictures: dict[str, Callable[[], Figure]] = {
        "state": draw_state,
        "spectrum": lambda: draw_spectrum(S_hat),
        "convergence": lambda: draw_convergence(S_hat, rhs),
        "layers": draw_layers,
        "ranks": draw_ranks,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures.items():
        draw().savefig(folder / f"{name}.png", metadata={"Software": None})
        print(folder / f"{name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for the pictures")
    torch.set_num_threads(1)
    main(parser.parse_args().output)
