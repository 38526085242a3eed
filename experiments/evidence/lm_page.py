"""All tables of the experiment `lm`, the text about them, and its picture."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..peers import GPU_MIXERS, MIXERS
from ..tasks.mqar_report import STYLE as MIXER_STYLE
from .picture import draw_band, new_panels, save
from .record import Cell
from .table import markdown_table, span, spread
from .training import SPEED

ALL = (*MIXERS, "hybrid")
FULL = (*ALL, *GPU_MIXERS)  # those of the full size
STYLE = {**MIXER_STYLE, "hybrid": ("hybrid of GKA and softmax attention", "#7b4f9d", "P")}
Entries = list[dict[str, Any]]
BySeed = dict[str, dict[int, dict[str, Any]]]  # models by mixer and seed
MEASURED = (SPEED, "peak bytes")  # by the short trainings for speed


def held_out_loss(entry: dict[str, Any]) -> float:
    held_out = entry["result"]["held out"]
    return float("inf") if held_out is None else float(held_out["loss"])


def section(entries: Entries, picture: Path) -> str:
    """Tables of the models, of recall by distance and of the learning rates; pictures of training and recall."""
    by_seed = {mixer: found for mixer in FULL if (found := models_of(entries, mixer))}
    speeds: dict[str, Entries] = defaultdict(list)
    for entry in entries:
        if entry["cell"]["part"] == "speed":
            speeds[entry["cell"]["mixer"]].append(entry["result"])
    _draw(by_seed, picture)
    parts = [_rates(entries)]
    if by_seed:
        some = next(iter(next(iter(by_seed.values())).values()))
        counts = span(sorted({len(found) for found in by_seed.values()}))
        middle = "" if counts == "1" else ", median over the seeds"
        parts = [
            _described(some["cell"], some["result"].get("corpus"), counts, bool(speeds)),
            markdown_table(
                [*_HEAD, *(_SPEED_HEAD if speeds else [])],
                [[*_row(found), *(_speeds(speeds[mixer]) if speeds else [])] for mixer, found in by_seed.items()],
            ),
            _findings(by_seed, entries),
            "Held-out loss of recall tokens in nats per token. A recall token is one whose bigram occurs earlier "
            f"in the window. The rows are distances in tokens to the last occurrence{middle}:",
            markdown_table(*_bins(by_seed, "distance")),
            f"Held-out loss by position in the window{middle}:",
            markdown_table(*_bins(by_seed, "position")),
            *parts,
        ]
    return "\n\n".join(parts)


def models_of(entries: Entries, mixer: str) -> dict[int, dict[str, Any]]:
    """The models with a mixer, by seed."""
    found = [e for e in entries if e["cell"]["part"] == "model" and e["cell"]["mixer"] == mixer]
    return {entry["cell"]["seed"]: entry for entry in found}


_HEAD = [
    "mixer", "million parameters", "learning rate", "held-out loss", "bits per byte", "recall tokens",
    "other tokens", "largest gradient norm",
]  # fmt: skip
_OF_SEEDS = (
    ": the median over the seeds, with the smallest and largest in brackets. The picture shows the training of "
    "the first seed and the recall of all seeds"
)
_SPEED_HEAD = ["tokens/s", "peak GB"]


def _described(cell: Cell, counts: dict[str, Any] | None, seeds: str, with_speed: bool) -> str:
    read = speed = ""
    if with_speed:
        speed = (
            " Tokens per second and peak memory are from short trainings, in which the mixers take turns; the "
            "speed is the median, with the smallest and largest in brackets. Models this small do not keep a "
            "large GPU busy: they wait for Python and for kernel launches, whose time varies with the load of "
            "the machine. If the ranges of two mixers overlap, their speeds cannot be distinguished. The "
            "implementation matters too: Gated DeltaNet uses the kernels of flash-linear-attention and Mamba-2 "
            "those of mamba_ssm if these packages are installed, otherwise the PyTorch code of transformers."
        )
    if counts:
        train, held = counts["train"], counts["validation"]
        read = (
            f" The training text is source code: {train['files']:,} files, {train['bytes'] / 1e6:.1f} MB, "
            f"{train['tokens'] / 1e6:.1f} million tokens. {held['files']:,} files are held out; the loss is "
            f"measured on {cell['eval_bytes'] / 1e6:g} MB of them."
        )
    return (
        "Which mixer gives the best small language model? All models are equal except for the mixer: "
        f"{cell['num_hidden_layers']} blocks, hidden size {cell['hidden_size']}, {cell['num_attention_heads']} "
        f"heads. They train on {cell['tokens'] / 1e6:g} million tokens in windows of {cell['seq_len']}, in "
        f"{cell['dtype']}; seeds: {seeds}.{read} Losses are in nats per "
        f"token{_OF_SEEDS if seeds != '1' else ''}.{speed}"
    )


def _speeds(rounds: list[dict[str, Any]]) -> list[str]:
    """Tokens per second and peak memory, if they were measured."""
    speeds, peaks = ([found[name] for found in rounds if found[name] is not None] for name in MEASURED)
    return [spread(speeds, ",.0f"), f"{max(peaks) / 1e9:.1f}" if peaks else ""]


def _row(models: dict[int, dict[str, Any]]) -> list[str]:
    """The table row of a mixer, from its models by seed."""
    some, held_out = models[min(models)], [entry["result"]["held out"] for entry in models.values()]
    head = [
        STYLE[some["cell"]["mixer"]][0],
        f"{some['result']['parameters'] / 1e6:.2f}",
        f"{some['result']['learning_rate']:g}",
    ]
    if not any(held_out):
        return [*head, f"diverged at step {some['result']['diverged']}", *[""] * (len(_HEAD) - 4)]

    def of(name: str, form: str) -> str:
        values = [None if read is None else read[name] for read in held_out]
        return spread(values, form) if any(value is not None for value in values) else ""

    norms = [max(norm for _, norm in entry["result"]["gradient norms"]) for entry in models.values()]
    return [
        *head,
        of("loss", ".4f"),
        of("bits_per_byte", ".4f"),
        of("recall_loss", ".3f"),
        of("other_loss", ".3f"),
        spread(norms, ".2f"),
    ]


def _rates(entries: Entries) -> str:
    """A table of the held-out loss of the short trainings."""
    short = {
        (e["cell"]["mixer"], e["cell"]["learning_rate"]): held_out_loss(e)
        for e in entries
        if e["cell"]["part"] == "rate"
    }
    if not short:
        return ""
    rates = sorted({rate for _, rate in short})
    rows = [
        [STYLE[mixer][0], *(_shown(short.get((mixer, rate))) for rate in rates)]
        for mixer in FULL
        if any(name == mixer for name, _ in short)
    ]
    table = markdown_table(["mixer", *(f"{rate:g}" for rate in rates)], rows)
    return (
        "Held-out loss of the short trainings that chose the learning rate. They are eight times shorter than the "
        f"full training, so they show only roughly which rate is best for it:\n\n{table}"
    )


def _shown(loss: float | None) -> str:
    return "" if loss is None else "diverged" if loss == float("inf") else f"{loss:.3f}"


def _bins(by_seed: BySeed, kind: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: the loss in every bin of `kind`, "distance" or "position"."""
    losses = {mixer: found for mixer in by_seed if (found := _losses_by(by_seed[mixer], kind))}
    bins = sorted({ends for found in losses.values() for ends in found})
    rows = [
        [f"{first} to {last}", *(_middle(found.get((first, last), [])) for found in losses.values())]
        for first, last in bins
    ]
    return [kind, *(STYLE[mixer][0] for mixer in losses)], rows


def _losses_by(models: dict[int, dict[str, Any]], kind: str) -> dict[tuple[int, int], list[float]]:
    """The losses of all seeds of a mixer, by the first and last distance or position of a bin.

    Empty if a training diverged.
    """
    found: dict[tuple[int, int], list[float]] = {}
    read = [entry["result"]["held out"] for entry in models.values()]
    for held_out in read if all(read) else []:
        for part in held_out[{"distance": "recall", "position": "positions"}[kind]]:
            losses = found.setdefault((part["first"], part["last"]), [])
            losses += [] if part["loss"] is None else [part["loss"]]
    return found


def _middle(losses: list[float]) -> str:
    return f"{statistics.median(losses):.3f}" if losses else ""


def _findings(by_seed: BySeed, entries: Entries) -> str:
    """GKA's held-out loss compared with each other mixer, seed by seed; and the mixers without a model."""
    losses = {
        mixer: {seed: held_out_loss(entry) for seed, entry in found.items()} for mixer, found in by_seed.items()
    }
    ours = {seed: loss for seed, loss in losses.get("gka", {}).items() if math.isfinite(loss)}
    if not ours:
        return ""
    apart = {
        mixer: [theirs[seed] - loss for seed, loss in ours.items() if math.isfinite(theirs.get(seed, math.nan))]
        for mixer, theirs in losses.items()
        if mixer != "gka"
    }
    beside = ", ".join(f"{spread(found, '+.4f')} for {STYLE[mixer][0]}" for mixer, found in apart.items() if found)
    tried = {entry["cell"]["mixer"] for entry in entries}
    missing = ", ".join(STYLE[mixer][0] for mixer in FULL if mixer in tried and mixer not in by_seed)
    said = [f"Difference from the loss of GKA, in nats per token (positive: worse): {beside}." if beside else ""]
    if gdn := apart.get("gdn"):
        holds = sum(x >= 0 for x in gdn)
        said.append(
            "Expected: the loss of GKA is at most that of Gated DeltaNet. "
            f"This holds for {holds} of {len(gdn)} seeds."
        )
    said.append(f"Not trained on all tokens yet: {missing}." if missing else "")
    if max(map(len, by_seed.values())) == 1:
        said.append(
            "Each mixer was trained once. The spread between seeds was not measured, so small differences "
            "mean nothing."
        )
    said.append(
        "The paper trains models of 2.8 billion parameters on 100 billion tokens. These models are less than a "
        "hundredth of that size and are trained on source code."
    )
    return " ".join(part for part in said if part)


def _draw(by_seed: BySeed, path: Path) -> None:
    """Training curves of the first seed; the median recall of the seeds, with a band from smallest to largest."""
    figure, panels = new_panels(1, 3, (14, 4.2), 120)
    curve, norms, recall = panels
    for mixer, found in by_seed.items():
        name, colour, marker = STYLE[mixer]
        model = found[min(found)]
        entry, result = model["cell"], model["result"]
        per_step = entry["seq_len"] * entry["batch_size"] / 1e6
        curve.plot(*_smooth(result["train loss"], per_step), color=colour, label=name, linewidth=1.2)
        norms.plot(*_smooth(result["gradient norms"], per_step), color=colour, linewidth=1.0)
        losses = {first: values for (first, _), values in sorted(_losses_by(found, "distance").items()) if values}
        if losses:
            draw_band(recall, list(losses), list(losses.values()), colour, marker=marker, markersize=4)
    curve.set_title("training loss, nats", loc="left", fontsize=11)
    norms.set_title("gradient norm", loc="left", fontsize=11)
    norms.set_yscale("log")
    for axes in (curve, norms):
        axes.set_xlabel("million tokens")
    recall.set_title("held-out loss of recall tokens", loc="left", fontsize=11)
    recall.set_xscale("log", base=2)
    recall.set_xlabel("tokens since their bigram")
    if by_seed:
        curve.legend(frameon=False, fontsize=8)
    save(figure, path)


def _smooth(points: list[list[float]], per_step: float) -> tuple[list[float], list[float]]:
    """Means of up to five neighbours, against millions of tokens, without the large losses of the first steps."""
    points = points[len(points) // 20 :]
    chunks = [points[i : i + 5] for i in range(0, len(points), 5)]
    return (
        [chunk[-1][0] * per_step for chunk in chunks],
        [sum(value for _, value in chunk) / len(chunk) for chunk in chunks],
    )
