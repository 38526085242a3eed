"""The sections of the experiment `seeds`: the short one with the answer, and all trainings.

A spread is the largest minus the smallest value of a group of trainings, in nats per token. A spread counts as
smaller than another one if it is at most half of it: with three trainings each, less says nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .picture import new_panels, save
from .table import markdown_table, spread

OURS = "GKA"
WEIGHTS, ORDER = "GKA, other weights, same order", "GKA, other order, same weights"
NUDGED = "GKA, weights changed by 1e-6"
NUDGED_GDN = "Gated DeltaNet, weights changed by 1e-6"
OTHERS = ("GLA (no solve)", "Gated DeltaNet", "softmax attention")
PARTS = {"the forget gate": "GKA, no forget gate", "the alpha connection": "GKA, no alpha connection"}
GATES = ("A_log", "dt_bias", "decay", "beta", "alpha")  # groups of gradients
Entries = list[dict[str, Any]]
Groups = dict[str, Entries]
_COLOURS = {
    OURS: "#c8553d", OTHERS[0]: "#3d7ea6", OTHERS[1]: "#2a9d8f", OTHERS[2]: "#8a8a8a", WEIGHTS: "#7b4f9d",
    ORDER: "#b8860b", NUDGED: "#1d3557",
}  # fmt: skip


def groups_of(entries: Entries) -> Groups:
    """The trainings that the page compares: each mixer with its seeds, and the controls, in the table's order."""

    def of(kind: str, same: Callable[[dict[str, Any]], bool]) -> Entries:
        return [e for e in entries if e["cell"]["kind"] == kind and same(e["cell"])]

    def own(c: dict[str, Any]) -> bool:
        return c["weights"] == c["order"] and not c["nudge"]

    def nudged(c: dict[str, Any]) -> bool:
        return c["weights"] == c["order"] == 0

    groups = {kind: of(kind, own) for kind in (OURS, *OTHERS)}
    groups[WEIGHTS] = of(OURS, lambda c: c["order"] == 0 and not c["nudge"])
    groups[ORDER] = of(OURS, lambda c: c["weights"] == 0 and not c["nudge"])
    groups[NUDGED], groups[NUDGED_GDN] = of(OURS, nudged), of("Gated DeltaNet", nudged)
    groups |= {kind: of(kind, own) for kind in PARTS.values()}
    return {name: found for name, found in groups.items() if found}


def values(group: Entries, name: str = "loss") -> list[float]:
    """The losses of the trainings that did not diverge."""
    found = [entry["result"].get(name) for entry in group]
    return [value for value in found if value is not None]


def width(numbers: list[float]) -> float | None:
    """The spread; None for fewer than two numbers."""
    return max(numbers) - min(numbers) if len(numbers) > 1 else None


def at_steps(group: Entries) -> dict[int, list[float]]:
    """The held-out losses at the steps where they were measured."""
    found: dict[int, list[float]] = {}
    for entry in group:
        for step, loss in entry["result"]["held out"]:
            found.setdefault(step, []).extend([] if loss is None else [loss])
    return dict(sorted(found.items()))


def overview(entries: Entries) -> str:
    """Question, table of at most ten rows, and answer."""
    groups, cell = groups_of(entries), entries[0]["cell"]
    first = cell["first_tokens"]
    steps = sorted({step for group in groups.values() for step in at_steps(group)})
    early = steps[len(steps) // 2] if steps else 0
    columns = ("spread", f"first {first} tokens", "later tokens", f"at step {early}")
    heads = ["trainings", "number", "held-out loss", *columns]
    rows = [
        [
            name,
            str(len(group)),
            spread(values(group), ".4f"),
            *(_width(values(group, part)) for part in ("loss", "first tokens", "later tokens")),
            _width(at_steps(group).get(early, [])),
        ]
        for name, group in groups.items()
    ]
    return "\n\n".join(
        (
            "Why do the language models of GKA differ between random seeds? The models of the experiment `lm` "
            f"train on {cell['tokens'] / 1e6:g} million tokens, in {cell['dtype']}. The table has the held-out "
            "loss in nats per token, the median with the smallest and largest in brackets. The spread is the "
            "largest minus the smallest loss of a group: of all tokens, of the first tokens of a window, of the "
            "later ones, and of all tokens in the middle of the training. A group has one seed for the first "
            "weights and the order of the text, unless its name says something else.",
            markdown_table(heads, rows),
            answer(groups, first),
        )
    )


def _width(numbers: list[float]) -> str:
    found = width(numbers)
    return "" if found is None else f"{found:.4f}"


def answer(groups: Groups, first_tokens: int) -> str:
    """What scatters the loss of GKA, what takes part in it, and what is ruled out."""
    whole = width(values(groups.get(OURS, [])))
    if whole is None:
        return "There are not two trainings of GKA with different seeds yet, so there is no answer."
    others = {name: found for name in OTHERS if (found := width(values(groups.get(name, [])))) is not None}
    beside = ", ".join(f"{found:.4f} with {name}" for name, found in others.items())
    said = f"The seeds of GKA spread by {whole:.4f} nats" + (f" ({beside})" if beside else "") + ". "
    linear = [found for name, found in others.items() if name != OTHERS[-1]]
    if linear and whole <= max(linear):
        said += "That is no more than another linear layer has, so there is nothing special to explain. "
    since = parting_step(groups[OURS])
    said += "" if since is None else f"They have half of their last spread from step {since} on. "
    lost = sum(entry["result"]["diverged"] is not None for group in groups.values() for entry in group)
    said += _cause(groups, whole)
    taking, ruled = _parts(groups, whole, first_tokens)
    said += f" Part of the cause: {', '.join(taking)}." if taking else ""
    said += f" Ruled out: {', '.join(ruled)}." if ruled else ""
    return said + (f" {lost} trainings diverged and are left out." if lost else "")


def parting_step(group: Entries) -> int | None:
    """The first step from which on the spread stays at least half of the last one; None if it is not known."""
    widths = {step: found for step, losses in at_steps(group).items() if (found := width(losses)) is not None}
    since = None
    for step in sorted(widths, reverse=True):
        if widths[step] < widths[max(widths)] / 2:
            break
        since = step
    return since


def _cause(groups: Groups, whole: float) -> str:
    """Whether first weights, order or any small difference scatter the loss."""
    weights, order, nudged = (width(values(groups.get(name, []))) for name in (WEIGHTS, ORDER, NUDGED))
    if nudged is not None and nudged > whole / 2:
        return (
            f"A change of the first weights by 1e-6 alone spreads the loss by {nudged:.4f}: the training "
            "amplifies any small difference, so no single property of a seed is the cause."
        )
    if weights is None or order is None:
        return "The controls of weights and order have not been trained yet."
    numbers = f"other weights spread it by {weights:.4f}, another order by {order:.4f}"
    if order <= weights / 2:
        return f"The first weights scatter the loss, not the order of the text: {numbers}."
    if weights <= order / 2:
        return f"The order of the text scatters the loss, not the first weights: {numbers}."
    return f"First weights and order of the text scatter the loss alike: {numbers}."


def _parts(groups: Groups, whole: float, first_tokens: int) -> tuple[list[str], list[str]]:
    """What takes part in the scatter, and what is ruled out."""
    taking, ruled = list[str](), list[str]()
    nudged = width(values(groups.get(NUDGED, [])))
    if nudged is not None and nudged <= whole / 2:
        ruled.append(f"amplified rounding (a change by 1e-6 spreads the loss by {nudged:.4f})")
    for part, name in PARTS.items():
        without = width(values(groups.get(name, [])))
        if without is not None:
            words = f"{part} (spread without it {without:.4f})"
            (taking if without <= whole / 2 else ruled).append(words)
    first, later = (width(values(groups[OURS], part)) for part in ("first tokens", "later tokens"))
    if first is not None and later is not None:
        words = f"{first:.4f} in the first {first_tokens} tokens of a window, {later:.4f} after them"
        if first <= later / 2:
            taking.append(f"the use of a long past ({words})")
        else:
            ruled.append(f"the use of a long past alone ({words})")
    for group in ("A_log", "dt_bias"):
        factor = _factor([_median_norm(entry, group) for entry in groups[OURS]])
        if factor is not None:
            words = f"the gradient of {group} (its median norm differs by a factor of {factor:.2f} between seeds)"
            (taking if factor > 2 else ruled).append(words)
    return taking, ruled


def _factor(norms: list[float | None]) -> float | None:
    given = [norm for norm in norms if norm]
    return max(given) / min(given) if len(given) > 1 else None


def norms_of(entry: dict[str, Any], group: str) -> list[list[float]]:
    """[step, root of the sum of the squared gradient norms of a group over the blocks]; without lost steps."""
    places = [n for n, (_, name) in enumerate(entry["result"]["groups"]) if name == group]
    found = []
    for step, norms in entry["result"]["group norms"]:
        squares = [norms[n] ** 2 for n in places if norms[n] is not None]
        if places and len(squares) == len(places):
            found.append([step, sum(squares) ** 0.5])
    return found


def _median_norm(entry: dict[str, Any], group: str) -> float | None:
    norms = [norm for _, norm in norms_of(entry, group)]
    return statistics.median(norms) if norms else None


def section(entries: Entries, picture: Path) -> str:
    """The losses of every training, and the gradient norms of its gates; draws the picture."""
    _draw(groups_of(entries), picture)
    steps = sorted({step for entry in entries for step, _ in entry["result"]["held out"]})
    heads = ["model", "weights", "order", "change", "loss", "first tokens", "later tokens", *map(str, steps)]
    rows, norms = [], []
    for entry in entries:
        cell, result = entry["cell"], entry["result"]
        name = [cell["kind"], str(cell["weights"]), str(cell["order"]), str(cell["nudge"])]
        at = dict(result["held out"])
        ends = [_loss(result.get(part)) for part in ("loss", "first tokens", "later tokens")]
        rows.append([*name, *ends, *(_loss(at.get(step)) for step in steps)])
        medians = [_median_norm(entry, group) for group in (*GATES, "beta and decay", "rest")]
        norms.append([*name, *("" if norm is None else f"{norm:.3g}" for norm in medians)])
    taken = sum(entry["seconds"] for entry in entries) / 60
    return "\n\n".join(
        (
            "Weights and order are random seeds; change is the seed of the change by 1e-6, 0 for none. Losses are "
            "in nats per token on held-out text: at the end, and after some steps, there on a quarter of it.",
            markdown_table(heads, rows),
            "Gradient norms before clipping, of all blocks together, median over the training; decay, beta and "
            "alpha are the projections of the gates:",
            markdown_table([*heads[:4], *GATES, "beta and decay", "rest"], norms),
            f"{len(entries)} trainings took {taken:,.0f} minutes, summed over processes that may share GPUs.",
        )
    )


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _draw(groups: Groups, path: Path) -> None:
    """When the seeds part, and the gradient norms of the decay of GKA by seed."""
    figure, (parting, norms) = new_panels(1, 2, (12.5, 4.6), 120)
    for name, colour in _COLOURS.items():
        widths = {
            step: found for step, losses in at_steps(groups.get(name, [])).items() if (found := width(losses))
        }
        if widths:
            line = "-" if name in (OURS, *OTHERS) else "--"
            parting.plot(
                list(widths), list(widths.values()), line, color=colour, marker="o", markersize=4, label=name
            )
    parting.set(xscale="log", yscale="log", xlabel="step", ylabel="nats per token")
    parting.set_title("spread of the held-out loss between trainings", loc="left", fontsize=11)
    if parting.lines:
        parting.legend(frameon=False, fontsize=8)
    for entry, style in zip(groups.get(OURS, []), ("-", "--", ":"), strict=False):
        for group, colour in (("A_log", "#1d3557"), ("dt_bias", "#c8553d"), ("decay", "#b8860b")):
            points = norms_of(entry, group)
            steps, sizes = [step for step, _ in points], [size for _, size in points]
            label = f"{group}, seed {entry['cell']['weights']}"
            norms.plot(steps, sizes, style, color=colour, linewidth=1, label=label)
    norms.set(yscale="log", xlabel="step")
    norms.set_title("gradient norms of GKA, all blocks", loc="left", fontsize=11)
    if norms.lines:
        norms.legend(frameon=False, fontsize=7, ncols=3)
    save(figure, path)
