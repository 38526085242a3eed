"""The pages of `spectra`: the answer by rule, three tables, and a picture with three panels."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from gka.ops.plan import Plan

from .picture import new_panels, save
from .table import markdown_table, paired

Entries = list[dict[str, Any]]
MOST_ROWS = 10
_ERRORS = 2.0  # standard errors that a difference must exceed
_SMALL = 1e-3  # nats per token that do not matter
_TOLERANCE = "0.01"  # of the sentence about products
_SOLVERS = {"chebyshev": "Chebyshev", "cg": "conjugate gradient"}


def overview(entries: Entries) -> str:
    """Question, table of the losses and answer for the evidence page."""
    entries = latest(entries)
    losses = _losses(entries)
    table = markdown_table(*_loss_table(losses)) if losses else ""
    parts = [
        _described(entries) + " The difference is from the first row, with its standard error.",
        table,
        _answer(entries),
    ]
    return "\n\n".join(part for part in parts if part)


def latest(entries: Entries) -> Entries:
    """The results of the latest model."""
    return [entry for entry in entries if entry["cell"]["weights"] == entries[-1]["cell"]["weights"]]


def _answer(entries: Entries) -> str:
    """The sentences about memory and spectra, and about the solvers."""
    layers = _part(entries, "layers")
    answers = [_retention(layers) if layers else "", _solver(_part(entries, "products"), _losses(entries))]
    return " ".join(answer for answer in answers if answer)


def page_text(entries: Entries) -> str:
    """All tables and the text about them."""
    layers, products, losses = _part(entries, "layers"), _part(entries, "products"), _losses(entries)
    parts = [_described(entries), _answer(entries)]
    if layers:
        parts += [_LAYERS_TEXT, markdown_table(*_layer_table(layers))]
    if products:
        parts += [_PRODUCTS_TEXT, markdown_table(*_product_table(products))]
    if losses:
        parts += [_LOSS_TEXT, markdown_table(*_loss_table(losses))]
    return "\n\n".join(part for part in parts if part)


_LAYERS_TEXT = (
    "Layers. The effective rank is the exponential of the entropy of the eigenvalues of S_kk, divided by their "
    "sum. The memory is the number of tokens after which a key counts 1/e of its first weight. Each number is the "
    "median over the heads, with the smallest and largest head in brackets; a head has its median over the "
    "positions. The column of eigenvalues has the share that is less than the ridge, over all positions and "
    "heads. The gates have their median, with the 5% and 95% points in brackets."
)
_PRODUCTS_TEXT = (
    "Products with S_kk until ||q - (S_kk + lambda) x|| is at most a tolerance times ||q||: median, 90% point and "
    "largest count over heads and positions. In the op 64 tokens stop together; the last column has these chunks. "
    "The points are medians over the layers, the largest count is that of all layers."
)
_LOSS_TEXT = (
    "Held-out loss of whole windows. The difference from the first row is paired by window, with its standard "
    "error. Products with S_kk are those of one solve."
)


def _part(entries: Entries, part: str) -> dict[str, Any] | None:
    """The latest result of a part."""
    found = [entry["result"] for entry in entries if entry["cell"]["part"] == part]
    return found[-1] if found else None


def _losses(entries: Entries) -> Entries:
    """The cells with losses, the reference first; empty without the reference."""
    found = [entry for entry in entries if entry["cell"]["part"] == "loss"]
    found.sort(key=lambda e: (e["cell"]["dtype"], e["cell"]["steps"]) != ("float32", [31]))
    return found if found and found[0]["cell"]["dtype"] == "float32" and found[0]["cell"]["steps"] == [31] else []


def _described(entries: Entries) -> str:
    cell = entries[0]["cell"]
    counts = [len(entry["result"]["windows"]) for entry in _losses(entries)]
    of_lm = Path(cell["model"]).parts[-3:] == ("lm-models", cell["size"], "gka")
    model = "the one of the experiment `lm` with GKA and the first seed" if of_lm else cell["model"]
    text = f"How does a trained model use the solve? The model is {model}"
    known = _part(entries, "layers") or _part(entries, "products")
    if known is not None:
        text += (
            f": {len(known['layers'])} GKA layers, heads of {known['D']} dims, a = {known['ridge ratio']:g}, "
            f"configured for {known['trained length']:,} tokens"
        )
    text += f". It reads windows of {cell['tokens']:,} held-out tokens"
    return text + (f", {counts[0]} of them for the losses." if counts else ".")


def _retention(layers: dict[str, Any]) -> str:
    """The sentence about memory and spectra."""
    each = layers["layers"]
    memory = [statistics.median(layer["memory"]) for layer in each]
    rank = statistics.median(value for layer in each for value in layer["rank"])
    below = statistics.mean(statistics.mean(layer["below"]) for layer in each)
    low, high = each[memory.index(min(memory))]["layer"], each[memory.index(max(memory))]["layer"]
    kind = "few directions" if rank < layers["D"] / 4 else "many directions"
    span = f"about {memory[0]:,.0f} tokens"
    if max(memory) > 1.5 * min(memory):
        span = f"{min(memory):,.0f} tokens (layer {low}) to {max(memory):,.0f} tokens (layer {high})"
    cut = statistics.mean(layer["memory cut"] for layer in each)
    longer = (
        f" At {cut:.0%} of the positions and heads the memory is longer than the text before them."
        if cut > 0.01
        else ""
    )
    return (
        f"The median head of a layer remembers {span}, and S_kk has {kind}: its median effective rank is "
        f"{rank:.1f} of {layers['D']}, and {below:.0%} of its eigenvalues are less than the ridge.{longer}"
    )


def _solver(products: dict[str, Any] | None, losses: Entries) -> str:
    """The sentence about products and losses."""
    said = []
    if products:
        cg, chebyshev = (
            statistics.median(layer[_TOLERANCE][name][1] for layer in products["layers"])
            for name in ("cg", "chebyshev")
        )
        said.append(
            f"For a residual of {_TOLERANCE}, 90% of the solves of a median layer need {cg:.0f} products of "
            f"conjugate gradient or {chebyshev:.0f} of Chebyshev iteration"
        )
    if losses:
        reference, *others = losses
        cost = {_name(e): paired(reference["result"]["windows"], e["result"]["windows"]) for e in others}
        same = [e for e in others if _is_same(*cost[_name(e)])]
        worse = {name: mean for name, (mean, error) in cost.items() if mean > max(_SMALL, _ERRORS * error)}
        if same:
            fewest = min(same, key=lambda e: _products(e["cell"]))
            said.append(
                f"the loss stays within {_SMALL:g} nats or {_ERRORS:g} standard errors with down to "
                f"{_products(fewest['cell'])} products ({_name(fewest)})"
            )
        if worse:
            said.append("it rises by " + ", ".join(f"{mean:.4f} with {name}" for name, mean in worse.items()))
        elif not same:
            said.append("the loss falls with all other settings")
    return "; ".join(said) + "." if said else ""


def _is_same(mean: float, error: float) -> bool:
    """Whether a difference is known well and does not matter."""
    return error <= _SMALL and abs(mean) <= max(_SMALL, _ERRORS * error)


def _name(entry: dict[str, Any]) -> str:
    """A setting in a sentence and in a table."""
    cell = entry["cell"]
    steps = ", ".join(map(str, cell["steps"])) + ("," if len(cell["steps"]) == 1 else "")
    return f"{_SOLVERS[cell['solver']]} ({steps}) in {cell['dtype']}"


def _products(cell: dict[str, Any]) -> int:
    """Products with S_kk of one solve."""
    return Plan(tuple(cell["steps"]), cell["solver"]).products


def shown_layers(each: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MOST_ROWS layers at equal distances, with the first and the last."""
    if len(each) <= MOST_ROWS:
        return each
    return [each[round(n * (len(each) - 1) / (MOST_ROWS - 1))] for n in range(MOST_ROWS)]


def _layer_table(layers: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = [
        "layer",
        "effective rank",
        "largest eigenvalue / norm",
        "eigenvalues below the ridge",
        "memory, tokens",
    ]
    rows = [
        [
            str(layer["layer"]),
            *(_heads(layer[name], form) for name, form in (("rank", ".1f"), ("top", ".2f"))),
            f"{statistics.mean(layer['below']):.0%}",
            _heads(layer["memory"], ",.0f"),
            *(_gate(layer.get(name)) for name in ("alpha", "beta")),
        ]
        for layer in shown_layers(layers["layers"])
    ]
    return [*head, "alpha", "beta"], rows


def _heads(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _gate(points: list[float] | None) -> str:
    return "1" if points is None else f"{points[1]:.2f} ({points[0]:.2f} to {points[2]:.2f})"


def _product_table(products: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    each = products["layers"]
    rows = []
    for tolerance in (name for name in each[0] if name != "layer"):
        cells = []
        for name in ("cg", "chebyshev", "chunks"):
            middle, most = (statistics.median(layer[tolerance][name][n] for layer in each) for n in (0, 1))
            cells.append(f"{middle:.0f}, {most:.0f}, {max(layer[tolerance][name][2] for layer in each):.0f}")
        rows.append([tolerance, *cells])
    return ["tolerance", "conjugate gradient", "Chebyshev", "conjugate gradient, chunks of 64 tokens"], rows


def _loss_table(losses: Entries) -> tuple[list[str], list[list[str]]]:
    reference = losses[0]["result"]
    rows = []
    for entry in losses[:MOST_ROWS]:
        mean, error = paired(reference["windows"], entry["result"]["windows"])
        apart = "" if entry is losses[0] else f"{mean:+.5f} ± {error:.5f}"
        rows.append([_name(entry), str(_products(entry["cell"])), f"{entry['result']['loss']:.5f}", apart])
    return ["solver", "products", "held-out loss", "difference"], rows


# The picture


def draw(entries: Entries, path: Path) -> None:
    """Eigenvalues below the ridge by index, memory of each head by layer, and what fewer products cost."""
    figure, (ridge, memory, cost) = new_panels(1, 3, (14, 4.2), 120)
    layers, losses = _part(entries, "layers"), _losses(entries)
    if layers:
        each = layers["layers"]
        for layer in shown_layers(each):
            shade = 0.85 - 0.7 * each.index(layer) / max(1, len(each) - 1)
            index = range(1, len(layer["below"]) + 1)
            ridge.plot(index, [100 * x for x in layer["below"]], color=(shade, 0.35, 1 - shade), linewidth=1.2)
        for layer in each:
            memory.plot(
                [layer["layer"]] * len(layer["memory"]), layer["memory"], "o", color="#c44e3b", markersize=4
            )
        middle = [statistics.median(layer["memory"]) for layer in each]
        memory.plot([layer["layer"] for layer in each], middle, color="#444444", linewidth=1.2)
    _draw_cost(cost, losses)
    ridge.set_title("ridge exceeds the eigenvalue, % (red: first layer)", loc="left", fontsize=11)
    ridge.set_xlabel("eigenvalue, 1 is the largest")
    memory.set_title("memory of each head, tokens", loc="left", fontsize=11)
    memory.set_xlabel("layer; line: median head")
    memory.set_yscale("log")
    memory.xaxis.get_major_locator().set_params(integer=True)
    cost.set_title("held-out loss above float32 (31,), nats", loc="left", fontsize=11)
    cost.set_xlabel("products; bars: two standard errors")
    save(figure, path)


def _draw_cost(axes: Any, losses: Entries) -> None:
    """The difference from the reference of each solver and dtype."""
    from matplotlib.ticker import FixedLocator

    looks = {("chebyshev", "float32"): ("#444444", "s"), ("chebyshev", "bfloat16"): ("#c44e3b", "o")}
    lowest = 0.0
    for solver, dtype in (*looks, ("cg", "bfloat16")):
        colour, marker = looks.get((solver, dtype), ("#2a9d8f", "D"))
        points = []
        for entry in losses[1:]:
            if (entry["cell"]["solver"], entry["cell"]["dtype"]) == (solver, dtype):
                mean, error = paired(losses[0]["result"]["windows"], entry["result"]["windows"])
                points.append((_products(entry["cell"]), mean, _ERRORS * error))
                lowest = min(lowest, mean - _ERRORS * error)
        if points:
            x, y, errors = zip(*sorted(points), strict=True)
            label = f"{_SOLVERS[solver]}, {dtype}"
            axes.errorbar(x, y, errors, color=colour, marker=marker, markersize=5, linewidth=1.2, label=label)
    if losses:
        axes.axhline(0.0, color="#999999", linewidth=0.8)
        axes.set_yscale("symlog", linthresh=1e-4)
        sizes = [sign * size for size in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 1.0) for sign in (1, -1)]
        axes.yaxis.set_major_locator(FixedLocator([0.0, *sizes]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(bottom=min(-5e-5, 1.2 * lowest))
        axes.legend(frameon=False, fontsize=8)
