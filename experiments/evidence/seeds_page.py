"""The sections of the experiment `seeds`: the short one with the answer, and all trainings.

A spread is the largest minus the smallest value of a group of trainings, in nats per token. Two groups are
compared only with equally many trainings, at least three. Then a spread is

    comparable         with another one, if it is at least half of it
    clearly smaller    if it is at most a fifth of it
    not told apart     between these

If two groups of three scatter alike (normal losses with the same variance), the first spread is at most half of
the second in 20% of all cases, at most 0.22 of it in 5%, at most a fifth of it in 4%. The answer makes up to eight
comparisons: two other linear layers, the change by 1e-6, weights with order and order with weights, two parts of
the layer, early with later tokens. If nothing differs, at least one spread comes out as clearly smaller in 25% of
all cases. So the answer says what the spreads are consistent with, not what the cause is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from .picture import new_panels, save
from .table import markdown_table, spread

OURS = "GKA"
WEIGHTS, ORDER = "GKA, other weights, same order", "GKA, other order, same weights"
NUDGED = "GKA, weights changed by 1e-6"
NUDGED_GDN = "Gated DeltaNet, weights changed by 1e-6"
OTHERS = ("GLA (no solve)", "Gated DeltaNet", "softmax attention")
PARTS = {"the forget gate": "GKA, no forget gate", "the alpha connection": "GKA, no alpha connection"}
GATES = ("A_log", "dt_bias", "decay", "beta", "alpha")  # groups of gradients
CLEARLY, COMPARABLE, LEAST = 0.2, 0.5, 3  # fractions of a spread; trainings of a group
NOISE = (0.04, 0.25)  # the chance of "clearly apart" where nothing differs: one comparison, any of eight
Entries = list[dict[str, Any]]
Verdict = Literal["clearly smaller", "comparable", "not told apart"]
Groups = dict[str, Entries]
_RULE = (
    "With three trainings in a group, only a difference of five times is found. "
    f"Spreads are compared between groups of equally many trainings, at least {LEAST}. A spread is clearly "
    "smaller than another one if it is at most a fifth of it; with at least half of it the two are consistent "
    "with the same scatter. If two groups of three scatter alike, a spread is clearly smaller "
    f"in {NOISE[0]:.0%} of all cases. The answer makes up to eight such comparisons: if nothing differs, at least "
    f"one spread is clearly smaller in {NOISE[1]:.0%} of all cases."
)
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


def compare(ours: list[float], theirs: list[float]) -> Verdict | None:
    """What the spread of some losses is, compared with another one; None without enough or equally many losses."""
    if len(ours) != len(theirs) or len(ours) < LEAST:
        return None
    spread_of_ours, spread_of_theirs = max(ours) - min(ours), max(theirs) - min(theirs)
    if spread_of_ours >= COMPARABLE * spread_of_theirs:
        return "comparable"
    return "clearly smaller" if spread_of_ours <= CLEARLY * spread_of_theirs else "not told apart"


def at_steps(group: Entries) -> dict[int, list[float]]:
    """The held-out losses of the trainings that did not diverge, at the steps where they were measured."""
    found: dict[int, list[float]] = {}
    for entry in (entry for entry in group if entry["result"]["diverged"] is None):
        for step, loss in entry["result"]["held out"]:
            found.setdefault(step, []).extend([] if loss is None else [loss])
    return dict(sorted(found.items()))


def overview(entries: Entries) -> str:
    """Question, table of at most ten rows, and answer."""
    groups, cell = groups_of(entries), entries[0]["cell"]
    first = cell["first_tokens"]
    steps = sorted({step for group in groups.values() for step in at_steps(group)})
    early = steps[len(steps) // 2] if steps else 0
    columns = ("spread", f"first {first} tokens", "later tokens", f"at step {early:,}")
    heads = ["trainings", "number", "held-out loss", *columns]
    at_early = (
        f", and of all tokens after {early:,} of {steps[-1]:,} steps, there on the first quarter of the text"
        if steps
        else ""
    )
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
            f"later ones{at_early}. A group has one seed for the first weights and the order of the text, unless "
            "its name says something else; some trainings are in several groups. Trainings so short may rank the "
            "mixers in another order than those of `lm`: only their spreads matter here.",
            markdown_table(heads, rows),
            answer(groups, first),
            _RULE,
        )
    )


def _width(numbers: list[float]) -> str:
    found = width(numbers)
    return "" if found is None else f"{found:.4f}"


def answer(groups: Groups, first_tokens: int) -> str:
    """The spreads, and what they are consistent with."""
    ours = values(groups.get(OURS, []))
    whole = width(ours)
    if whole is None:
        return "There are not two trainings of GKA with different seeds yet, so there is no answer."
    others = {name: found for name in OTHERS if (found := width(values(groups.get(name, [])))) is not None}
    beside = ", ".join(f"{found:.4f} with {name}" for name, found in others.items())
    said = [f"The seeds of GKA spread by {whole:.4f} nats" + (f" ({beside})" if beside else "") + "."]
    for name in OTHERS[:2]:
        said += _beside_another(name, values(groups.get(name, [])), ours)
    since = parting_step(groups[OURS])
    if since is not None and since < max(at_steps(groups[OURS])):
        said.append(f"From step {since} on their spread stays at least half of the last one.")
    if len(ours) < LEAST:
        said.append("With two seeds a spread says too little for a comparison with the controls.")
    else:
        said += [*_cause(groups, ours), *_parts(groups, ours, first_tokens)]
    said += _gradients(groups[OURS])
    lost = {
        _cell(entry) for group in groups.values() for entry in group if entry["result"]["diverged"] is not None
    }
    if lost:
        count = "One training has" if len(lost) == 1 else f"{len(lost)} trainings have"
        said.append(f"{count} diverged and {'is' if len(lost) == 1 else 'are'} left out.")
    return " ".join(said)


def _cell(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry["cell"][name] for name in ("kind", "weights", "order", "nudge"))


def _beside_another(name: str, theirs: list[float], ours: list[float]) -> list[str]:
    """A sentence about another linear layer, if it can be compared."""
    verdict = compare(theirs, ours)
    if verdict is None:
        return []
    if max(theirs) - min(theirs) >= max(ours) - min(ours):
        return [f"That is not more than with {name}."]
    return [f"That is {'clearly' if verdict == 'clearly smaller' else 'not clearly'} more than with {name}."]


def parting_step(group: Entries) -> int | None:
    """The first step from which on the spread stays at least half of the last one; None if it is not known."""
    widths = {step: found for step, losses in at_steps(group).items() if (found := width(losses)) is not None}
    since = None
    for step in sorted(widths, reverse=True):
        if widths[step] < widths[max(widths)] / 2:
            break
        since = step
    return since


def _cause(groups: Groups, ours: list[float]) -> list[str]:
    """Sentences: whether any small difference, the first weights or the order reproduce the spread of GKA."""
    nudged = values(groups.get(NUDGED, []))
    words = f"A change of the first weights by 1e-6 alone spreads the loss by {_width(nudged)}"
    match compare(nudged, ours):
        case "comparable":
            return [
                f"{words}, at least half as much: consistent with a training that amplifies small differences."
            ]
        case "clearly smaller":
            return [f"{words}, clearly less: consistent with no amplified rounding.", _source(groups, ours)]
        case "not told apart":
            return [f"{words}, less than half as much, but not clearly less.", _source(groups, ours)]
        case _:
            return ["The change by 1e-6 has not as many trainings as GKA.", _source(groups, ours)]


def _source(groups: Groups, ours: list[float]) -> str:
    """Whether the first weights or the order alone reproduce the spread of GKA."""
    weights, order = (values(groups.get(name, [])) for name in (WEIGHTS, ORDER))
    alone = compare(weights, ours), compare(order, ours)
    if None in alone:
        return "The controls of weights and order have not as many trainings as GKA, so they have no verdict."
    numbers = f"other weights spread the loss by {_width(weights)}, another order by {_width(order)}"
    if "comparable" not in alone:
        return f"Neither the first weights nor the order of the text alone makes half of the spread: {numbers}."
    if compare(order, weights) == "clearly smaller":
        return f"Consistent with the first weights as the source, and not the order of the text: {numbers}."
    if compare(weights, order) == "clearly smaller":
        return f"Consistent with the order of the text as the source, and not the first weights: {numbers}."
    if alone == ("comparable", "comparable"):
        return f"The first weights alone and the order of the text alone each make half of it or more: {numbers}."
    which = "the first weights" if alone[0] == "comparable" else "the order of the text"
    return f"Only {which} alone makes half of the spread, but the two are not clearly apart: {numbers}."


def _parts(groups: Groups, ours: list[float], first_tokens: int) -> list[str]:
    """Sentences: what the spreads are consistent with as a part of the scatter."""
    first, later = (values(groups[OURS], part) for part in ("first tokens", "later tokens"))
    compared = [
        (f"{part} (spread without it {_width(without)})", compare(without, ours))
        for part, name in PARTS.items()
        if (without := values(groups.get(name, [])))
    ]
    if later:
        words = f"{_width(first)} in the first {first_tokens} tokens of a window, {_width(later)} after them"
        compared.append((f"the use of a long past ({words})", compare(first, later)))
    heads: dict[Verdict | None, str] = {
        "clearly smaller": "These may have a part in the spread",
        "comparable": "These need no part in it",
        "not told apart": "No answer for",
        None: "Not compared, for too few or not equally many trainings",
    }
    by_verdict = {
        head: [words for words, found in compared if found == verdict] for verdict, head in heads.items()
    }
    return [f"{head}: {', '.join(words)}." for head, words in by_verdict.items() if words]


def _gradients(group: Entries) -> list[str]:
    """A sentence with the gradient norms that were measured, of trainings that did not diverge."""
    group = [entry for entry in group if entry["result"]["diverged"] is None]
    factors = {name: _factor([_median_norm(entry, name) for entry in group]) for name in ("A_log", "dt_bias")}
    words = [f"a factor of {factor:.2f} for {name}" for name, factor in factors.items() if factor is not None]
    return [f"The median gradient norms of the seeds differ by {' and '.join(words)}."] if words else []


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
            "in nats per token on held-out text: at the end, and after some steps, there on the first quarter "
            "of it.",
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
        figure.legend(handles=parting.lines, loc="outside lower left", ncols=3, frameon=False, fontsize=8)
    for entry, style in zip(groups.get(OURS, []), ("-", "--", ":"), strict=False):
        for group, colour in (("A_log", "#1d3557"), ("dt_bias", "#c8553d"), ("decay", "#b8860b")):
            points = norms_of(entry, group)
            steps, sizes = [step for step, _ in points], [size for _, size in points]
            label = f"{group}, seed {entry['cell']['weights']}"
            norms.plot(steps, sizes, style, color=colour, linewidth=1, label=label)
    norms.set(yscale="log", xlabel="step")
    norms.set_title("gradient norms of GKA, all blocks", loc="left", fontsize=11)
    if norms.lines:
        figure.legend(handles=norms.lines, loc="outside lower right", ncols=3, frameon=False, fontsize=8)
    save(figure, path)
