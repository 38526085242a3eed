"""The evidence page: of each experiment one question, one table of at most ten rows, and a short answer.

Answers follow from the results by the rules written here. The modules of the experiments have all tables.

Legend: T tokens of a sequence, P pairs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from ..tasks.recall_mixers import MIXERS as RECALL_MIXERS
from . import ablations as parts_of_layer
from . import cost as costs
from . import large_page, parts_page, recall_page, seeds_page, spectra_page
from . import lm_page as models
from . import long as contexts
from . import mqar_page as mixed
from .numerics import SOLVERS
from .numerics_page import values
from .table import markdown_table, spread

Entries = list[dict[str, Any]]
ROWS = 10  # of a table


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def numerics(entries: Entries) -> str:
    """Errors after 30 products."""

    def middle(solver: str, dtype: str, **wanted: Any) -> float:
        found = [math.inf if x is None else x for x in values(entries, 30, solver=solver, dtype=dtype, **wanted)]
        return statistics.median(found) if found else math.nan

    kinds = [
        (dtype, {"part": part, **layers})
        for part, layers in (("iterations", {}), ("gradients", {"layers": 5}))
        for dtype in ("float32", "bfloat16")
    ]
    errors = {name: [middle(name, dtype, **wanted) for dtype, wanted in kinds] for name in SOLVERS}
    head = ["solver", "x, float32", "x, bfloat16", "gradients, float32", "gradients, bfloat16"]
    rows = [[name, *("" if math.isnan(x) else f"{x:.1e}" for x in found)] for name, found in errors.items()]
    best = []
    for column in (0, 1, 3):
        known = {name: found[column] for name, found in errors.items() if not math.isnan(found[column])}
        name = min(known, key=known.__getitem__, default="")
        best.append(f"{name} ({known[name]:.1e})" if name else "no solver yet")
    return _joined(
        "How exact are the solvers after 30 products of the state with a vector? The numbers are relative "
        "errors of the solution x, and of the gradients through five layers, compared with an exact solve in "
        "float64 (a = 0.02; median of the seeds). The columns name the dtype of the products.",
        markdown_table(head, rows),
        f"With float32 products the smallest error of x is that of {best[0]}. With bfloat16 products it is that "
        f"of {best[1]}, and the smallest error of gradients is that of {best[2]}.",
    )


def mqar(entries: Entries) -> str:
    """Mean accuracy by dim, when one model reads sequences of many lengths."""
    found = mixed.best(entries)
    mixers = [mixer for mixer in mixed.ALL_MIXERS if any(row["mixer"] == mixer for row in found)]
    at = {(row["dim"], row["mixer"]): mixed.over_tasks(row) for row in found}
    dims = sorted({dim for dim, _ in at})
    rows = [
        [str(dim), *(f"{100 * statistics.mean(x):.1f}" if (x := at.get((dim, m))) else "" for m in mixers)]
        for dim in dims
    ]
    counts = "; ".join(
        f"{mixed.STYLE[other][0]}: better in {x.better}, equal in {x.equal}, worse in {x.worse}"
        for other, x in mixed.compared(found).items()
    )
    lost = mixed.lost(found)
    return _joined(
        "How many key/value pairs can a model recall that reads sequences of 64 to 1024 tokens in one training? "
        "The numbers are percent of right answers, the mean over all settings (numbers of tokens and pairs) and "
        "3 seeds. The gates and the alpha connection of GKA are on.",
        markdown_table(["dim", *(mixed.STYLE[mixer][0] for mixer in mixers)], rows),
        f"GKA compared with the others, as numbers of settings (up to half a percent counts as equal), without "
        f"failed trainings: {counts}."
        if counts
        else "",
        f"Failed trainings, which say nothing about the mixer: {lost}." if lost else "",
    )


def recall(entries: Entries) -> str:
    """The best accuracy at every place, and whether figure 3a holds."""
    found = recall_page.best(entries)
    mixers = [mixer for mixer in RECALL_MIXERS if any(key[2] == mixer for key in found)]
    places, dims = sorted({key[0] for key in found}), sorted({key[1] for key in found})

    def cell(place: tuple[int, int], mixer: str) -> str:
        known = [found.get((place, dim, mixer)) for dim in dims]
        said = [
            f"{100 * statistics.median(x.accuracies):.1f}" + "?" * (not x.complete) if x else "?" for x in known
        ]
        return " / ".join(said)

    names = [RECALL_MIXERS[mixer].name for mixer in mixers]
    one_seed = recall_page.have_one_seed(entries)
    rows = [[f"{T}, {P}", *(cell((T, P), mixer) for mixer in mixers)] for T, P in places]
    return _joined(
        "Does the paper's figure 3a hold, in its own setting? The figure shows GKA without gates and without "
        "the alpha connection above all other layers that have a state. Every training ends once its accuracy is "
        "above 99 percent, so two mixers that get there are equal. The numbers are percent of right answers with "
        f"the best learning rate, at model dims {' / '.join(map(str, dims))}. A question mark: not all learning "
        "rates were tried yet. The picture shows the accuracy after each epoch. This form of GKA is not the "
        f"default layer, which has both.{' All trainings have the same seed.' * one_seed}",
        markdown_table(["tokens, pairs", *names], rows),
        " ".join((recall_page.attention(found), recall_page.verdict(found, *recall_page.wanted(entries))[1])),
        recall_page.epochs(entries, mixers),
    )


def lm(entries: Entries) -> str:
    """Held-out losses of the language models, and with which mixers every seed is better or worse."""
    by_seed = {mixer: found for mixer in models.FULL if (found := models.models_of(entries, mixer))}
    losses = {mixer: {n: models.held_out_loss(e) for n, e in found.items()} for mixer, found in by_seed.items()}
    speeds = {
        mixer: [e["result"][models.SPEED] for e in entries if e["cell"].get("part") == "speed"
                and e["cell"]["mixer"] == mixer and e["result"][models.SPEED] is not None]
        for mixer in by_seed
    }  # fmt: skip

    def of(mixer: str, name: str) -> list[float | None]:
        read = [entry["result"]["held out"] for entry in by_seed[mixer].values()]
        return [None if x is None else x[name] for x in read]

    rows = [
        [models.STYLE[m][0], spread(of(m, "loss"), ".3f"), spread(of(m, "recall_loss"), ".3f"),
         f"{statistics.median(speeds[m]):,.0f}" if speeds[m] else ""]
        for m in by_seed
    ]  # fmt: skip
    ours, signs = losses.get("gka", {}), {-1: list[str](), 0: list[str](), 1: list[str]()}
    for mixer, theirs in losses.items():
        apart = [loss - ours[seed] for seed, loss in theirs.items() if seed in ours]
        if mixer != "gka" and apart:
            sign = 1 if min(apart) > 0 else -1 if max(apart) < 0 else 0
            signs[sign].append(models.STYLE[mixer][0])
    words = {1: "lower for every seed than with", -1: "higher for every seed than with",
             0: "lower for some seeds and higher for others than with"}  # fmt: skip
    said = "; ".join(f"{words[sign]} {', '.join(names)}" for sign, names in signs.items() if names)
    medians = {mixer: statistics.median(theirs.values()) for mixer, theirs in losses.items()}
    best = [
        f"{models.STYLE[mixer][0]} ({medians[mixer]:.3f})" for mixer in sorted(medians, key=medians.__getitem__)
    ]
    return _joined(
        "Which mixer gives the best small language model? All models have the same size and read the same "
        "source code in the same order. Losses are in nats per held-out token, the median of the seeds, with "
        "the smallest and largest in brackets. A recall token is one whose bigram occurs earlier in the window.",
        markdown_table(["mixer", "held-out loss", "loss of recall tokens", "tokens/s in training"], rows),
        f"The smallest median losses: {', '.join(best[:3])}." if len(best) > 3 else "",
        f"The loss with GKA is {said}." if said else "",
        "Models this small wait for Python, so their speeds vary with the machine."
        if any(speeds.values())
        else "",
    )


def long(entries: Entries) -> str:
    """The needle score by length, and which differences are more than two standard errors."""
    mixers = [mixer for mixer in models.ALL if any(entry["cell"]["mixer"] == mixer for entry in entries)]
    scores = {
        (e["cell"]["mixer"], e["cell"]["task"], e["cell"]["length"]): e["result"]
        for e in entries
        if e["cell"]["part"] == "score"
    }
    lengths, trained = contexts.lengths_of(scores), entries[0]["cell"]["seq_len"]
    means = [[contexts.needle_mean(scores, mixer, T) for mixer in mixers] for T in lengths]
    rows = [
        [f"{T:,}", *("" if x is None else f"{100 * x:.1f}" for x in row)]
        for T, row in zip(lengths, means, strict=True)
    ]
    clear, unclear = list[str](), list[str]()
    for mixer in mixers:
        at = contexts.difference(scores, mixer, trained) if mixer != "gka" else None
        if at:
            (clear if abs(at.points) > 2 * at.error else unclear).append(f"{models.STYLE[mixer][0]} ({at})")
    said = [f"differs from that of {', '.join(clear)}"] * bool(clear)
    said += [f"is within two standard errors of that of {', '.join(unclear)}"] * bool(unclear)
    return _joined(
        f"Can small models use a long context? The models of `lm` are trained further on rows of {trained:,} "
        "tokens. Then they do tasks of RULER's kind: find needles, follow variables, count words. The numbers "
        "are percent of right answers, the mean over the tasks, with one seed.",
        markdown_table(["tokens", *(models.STYLE[mixer][0] for mixer in mixers)], rows) if scores else "",
        f"At {trained:,} tokens the score of GKA {', and '.join(said)} (percentage points)." if said else "",
        "Longer lengths than that were not seen in training." if lengths and lengths[-1] > trained else "",
    )


def ablations(entries: Entries) -> str:
    """The variants that differ most from the base."""
    by_name = {name: parts_of_layer.results_of(entries, name) for name in parts_of_layer.TRIALS}
    by_name = {name: results for name, results in by_name.items() if results}
    found = parts_of_layer.differences(by_name)
    if found is None:
        apart = {name: parts_of_layer.beside(name, by_name) for name in by_name}
        sizes = {
            n: max(abs(y or 0.0) for y in x.values()) for n, x in apart.items() if x and n != parts_of_layer.BASE
        }
    else:
        sizes = {name: abs(x) for name, x in found.medians.items() if name not in found.alike}
    names = sorted(sizes, key=sizes.__getitem__, reverse=True)[:ROWS]
    rows = [
        [name, spread(list(parts_of_layer.beside(name, by_name).values()), "+.3f"),
         str(sum(len(result["spikes"]) for result in by_name[name].values()))]
        for name in names
    ]  # fmt: skip
    said = ""
    if found is not None:
        worse = [name for name, x in found.medians.items() if x > found.single and name not in found.alike]
        better = [name for name, x in found.medians.items() if -x > found.single and name not in found.alike]
        said = (
            f"Variants that solve the same system as the base differ from it by up to {found.single:.3f} in one "
            f"seed, which is chance. These are worse than the base by more than that: {_quoted(worse)}. These are "
            f"better by more than that: {_quoted(better)}."
        )
    return _joined(
        "Which parts of the layer help? Small language models differ from the base, the layer with its "
        "defaults, in one thing each. The numbers are differences of the held-out loss from the base in nats "
        "(positive: worse), and steps whose gradient norm jumps (spikes).",
        markdown_table(["variant", "difference from the base", "spikes of all seeds"], rows),
        said,
    )


def _quoted(names: list[str]) -> str:
    return ", ".join(f'"{name}"' for name in names) or "none"


def cost(entries: Entries) -> str:
    """Milliseconds at three lengths, and the largest of them compared with GKA."""
    mixers = [mixer for mixer in costs.ALL if any(e["cell"]["mixer"] == mixer for e in entries)]
    lengths = sorted({e["cell"]["tokens"] for e in entries})
    chosen = sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})
    times = {(mixer, what): dict(costs.points_of(entries, mixer, what)) for mixer in mixers for what in costs.WHAT}
    rows = [
        [what, f"{T:,}", *(_milliseconds(times[mixer, what].get(T)) for mixer in mixers)]
        for what in costs.WHAT
        for T in chosen
    ]
    names, last, what = [costs.STYLE[mixer][0] for mixer in mixers], chosen[-1], "forward+backward"
    ours = times.get(("gka", what), {}).get(last)
    said = [
        f"{name} {_ratio(theirs / ours)} times"
        for mixer, name in zip(mixers, names, strict=True)
        if ours and mixer != "gka" and (theirs := times[mixer, what].get(last))
    ]
    grown = []
    for mixer in ("gka", "attention"):
        points = costs.points_of(entries, mixer, what)[-2:]
        if len(points) == 2:
            grown.append(f"{costs.STYLE[mixer][0]} {_ratio(points[1][1] / points[0][1])} times")
    held = {
        mixer: max((e["result"].get("cache bytes") or 0 for e in entries
                    if e["cell"]["mixer"] == mixer and e["cell"]["tokens"] == last), default=0)
        for mixer in ("gka", "attention")
    }  # fmt: skip
    return _joined(
        "How do time and memory of one block grow with the length of a sequence? The numbers are milliseconds. "
        "Times of a few milliseconds are mostly Python and kernel launches.",
        markdown_table(["what", "tokens", *names], rows),
        f"Forward and backward of {last:,} tokens take GKA {_milliseconds(ours)} ms; compared with that, "
        f"{', '.join(said)} as long." if ours and said else "",
        f"Twice the tokens, up to {last:,}, take {', '.join(grown)} as long." if len(grown) == 2 else "",
        f"After {last:,} tokens the cache of a GKA block has {held['gka'] / 1e6:.3g} MB, that of softmax "
        f"attention {held['attention'] / 1e6:.4g} MB." if all(held.values()) else "",
    )  # fmt: skip


def _ratio(x: float) -> str:
    return f"{x:.2g}" if x < 10 else f"{x:,.0f}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


OVERVIEWS: dict[str, Callable[[Entries], str]] = {
    "numerics": numerics,
    "mqar": mqar,
    "parts": parts_page.overview,
    "recall": recall,
    "lm": lm,
    "seeds": seeds_page.overview,
    "long": long,
    "ablations": ablations,
    "large": large_page.overview,
    "spectra": spectra_page.overview,
    "cost": cost,
}
