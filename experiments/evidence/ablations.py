"""The effect of each part of the layer: small language models that differ in one thing, trained in the same way.

The models have four blocks of hidden size 256, four heads of 64 dims, and a vocabulary of 8192 tokens with tied
embeddings. They train on ten million tokens in windows of 1024, with one learning rate and three seeds. The seed
decides the initial weights and the order of the text. Variants that are options of the layer run in the layer. A
constant ridge, a sketch and conjugate gradient are not options; `variants.py` computes them in PyTorch, so their
speed is not the speed of kernels. Other initial values of gates are set on the built model (`starts.py`).

In bfloat16 the kernels of the layer use bfloat16 products. A solve of two stages refines the result; "steps (31,)"
is the plain solve of the paper. On a CPU there are no kernels, and a solve of one stage has float32 products.

Gradient norms are measured at every step before clipping to 1. A spike is a step with a norm of more than three
times the median of the up to 32 steps before it; steps count from the ninth on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import set_seed

from gka.hf import GKAForCausalLM

from . import corpus as text
from .picture import new_panels, save
from .record import Cell
from .skeleton import skeleton
from .starts import Start, start_from
from .table import markdown_table, span, spread
from .training import steps_of, train_on_text
from .variants import Variant, with_variant

SUMMARY = "effect of each part of the layer on training"
BY_MACHINE = False
Entries = list[dict[str, Any]]


@dataclass(frozen=True)
class Trial:
    """One change: fields of GKAConfig, the dtype of training, a variant of `variants.py`, or initial values."""

    fields: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    change: Variant | None = None
    start: Start = Start()  # noqa: RUF009  (frozen)


BASE, _FLOAT32, _CONSTANT = "base", "float32, steps (31,)", "lambda = 0.25"
# In the order of the table and of the trainings: variants with kernels come first.
TRIALS = {
    BASE: Trial(),
    "no forget gate": Trial({"use_forget_gate": False}),
    "no alpha connection": Trial({"use_alpha_connection": False}),
    "no beta gate": Trial({"use_beta_gate": False}),
    "alpha starts at 0.88": Trial(start=Start(alpha_bias=2.0)),
    "alpha starts at 0.12": Trial(start=Start(alpha_bias=-2.0)),
    "A starts 10 times smaller": Trial(start=Start(rate=0.1)),
    "dt starts 10 times smaller": Trial(start=Start(step=0.1)),
    "first weights 0.02": Trial({"initializer_range": 0.02}),
    "a = 0.01": Trial({"ridge_ratio": 0.01}),
    "a = 0.05": Trial({"ridge_ratio": 0.05}),
    "a = 0.1": Trial({"ridge_ratio": 0.1}),
    "steps (31,)": Trial({"solver_steps": [31]}),
    "steps (16, 8)": Trial({"solver_steps": [16, 8]}),
    "steps (8,)": Trial({"solver_steps": [8]}),
    _FLOAT32: Trial({"solver_steps": [31]}, dtype="float32"),
    _CONSTANT: Trial(change=Variant(ridge=0.25)),
    "sketch, d = 16": Trial(change=Variant(sketch=16)),
    "sketch, d = 32": Trial(change=Variant(sketch=32)),
    "sketch, d = 64": Trial(change=Variant(sketch=64)),
    "conjugate gradient": Trial(change=Variant(solver="conjugate gradient")),
    "conjugate gradient, float32 products": Trial(change=Variant(solver="conjugate gradient", wide=True)),
}
_SMALL = (BASE, "no alpha connection", "steps (8,)", _FLOAT32, _CONSTANT, "sketch, d = 16",
          "conjugate gradient")  # fmt: skip
_SIZES: dict[str, dict[str, Any]] = {
    "small": dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, seq_len=64,
        batch_size=2, tokens=384, eval_bytes=2_000, learning_rate=1e-3,
    ),
    "full": dict(
        hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, seq_len=1024,
        batch_size=16, tokens=10_000_000, eval_bytes=1_000_000, learning_rate=3e-3,
    ),
}  # fmt: skip
# These solve the same system as the base with an error of at most a percent, so their differences show chance.
_ALIKE = ("steps (31,)", "steps (16, 8)", _FLOAT32, "conjugate gradient", "conjugate gradient, float32 products")
_MODEL = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_HELD_OUT = ("loss", "bits_per_byte", "tokens", "recall_loss", "recall_tokens", "other_loss")
_LOSS_STEPS = 10  # an entry of the loss is the mean over so many steps
_WINDOW, _FIRST, _SPIKE = 32, 8, 3.0

prepare = text.prepare


def cells(size: str) -> list[Cell]:
    """All trials, one seed after the other. Small: one seed and three steps."""
    names, seeds = (TRIALS, (0, 1, 2)) if size == "full" else (_SMALL, (0,))
    return [
        {"variant": name, "dtype": TRIALS[name].dtype, "seed": seed, **_SIZES[size]}
        for seed in seeds
        for name in names
    ]


def ready(cell: Cell, entries: Entries) -> bool:
    """Every cell may run at any time."""
    return True


def run(cell: Cell, folder: Path, device: torch.device) -> Any:
    """Train a model and measure its loss on held-out text."""
    data = text.Corpus.load(folder.parents[1], cell["size"])
    model = build(cell, len(data.tokenizer), data.tokenizer.eos_token_id)
    trained, held_out = train_on_text(
        model,  # type: ignore[arg-type]
        data,
        cell,
        folder,
        learning_rate=cell["learning_rate"],
        eval_bytes=cell["eval_bytes"],
        device=device,
        log_every=1,
    )
    read = None if held_out is None else held_out.as_dict()
    norms = [_rounded(norm) for _, norm in trained.grad_norms]
    return {
        "parameters": model.num_parameters(),
        "train loss": _means(trained.loss),
        "gradient norms": norms,
        "spikes": spikes(norms),
        "diverged": trained.diverged,
        "held out": None if read is None else {name: read[name] for name in _HELD_OUT},
    }


def build(cell: Cell, vocab_size: int, end: int) -> GKAForCausalLM:
    """The model of a cell with initial weights."""
    trial = TRIALS[cell["variant"]]
    set_seed(cell["seed"])
    model = GKAForCausalLM(
        skeleton(
            "gka",
            vocab_size=vocab_size,
            max_position_embeddings=cell["seq_len"],
            tie_word_embeddings=True,
            eos_token_id=end,
            bos_token_id=end,
            **{name: cell[name] for name in _MODEL},
            **trial.fields,
        )
    )
    start_from(model, trial.start)
    if trial.change is not None:
        with_variant(model, trial.change)
    return model


def spikes(norms: Sequence[float | None]) -> list[int]:
    """The steps, counted from 1, with a spike of the norm or a norm that is not finite (None); see the module."""
    found = []
    for number, norm in enumerate(norms):
        before = [x for x in norms[max(0, number - _WINDOW) : number] if x is not None]
        if norm is None or (number >= _FIRST and before and norm > _SPIKE * statistics.median(before)):
            found.append(number + 1)
    return found


def _rounded(norm: float) -> float | None:
    return float(f"{norm:.4g}") if math.isfinite(norm) else None


def _means(loss: list[list[float]]) -> list[list[float]]:
    """[step, mean of the losses up to it] for every _LOSS_STEPS steps."""
    groups = [loss[i : i + _LOSS_STEPS] for i in range(0, len(loss), _LOSS_STEPS)]
    return [[group[-1][0], round(statistics.fmean(x for _, x in group), 5)] for group in groups]


# The page


def section(entries: Entries, picture: Path) -> str:
    """A table with one row per variant; the picture has the differences from the base and the gradient norms."""
    by_name = {name: results_of(entries, name) for name in TRIALS}
    by_name = {name: results for name, results in by_name.items() if results}
    _draw(by_name, picture)
    cell = entries[-1]["cell"]
    seeds = sorted({len(results) for results in by_name.values()})
    counts = next((r["held out"] for e in entries if (r := e["result"])["held out"]), None)
    read = "" if counts is None else (
        f" The held-out text has {counts['tokens']:,} tokens. {counts['recall_tokens']:,} of them are recall "
        "tokens: their bigram occurs earlier in the window."
    )  # fmt: skip
    return "\n\n".join(
        (
            "Which parts of the layer help? Each variant changes one part of the base. The base is the layer "
            "with its defaults in bfloat16: forget gate, alpha connection, a = 0.02, solver steps (16, 16). All "
            f"models have {cell['num_hidden_layers']} blocks of hidden size {cell['hidden_size']} with heads of "
            f"{cell['hidden_size'] // cell['num_attention_heads']} dims. They train on {cell['tokens']:,} tokens "
            f"in {steps_of(cell)} steps, in windows of {cell['seq_len']}, with learning rate "
            f"{cell['learning_rate']:g}; seeds: {span(seeds)}.{read}",
            "Losses are in nats per token: the median over the seeds, with the smallest and largest in "
            "brackets. The difference from the base is computed seed by seed. The training loss is the mean "
            "over the last tenth of the training. A spike is a step whose gradient norm, before clipping, is "
            f"more than {_SPIKE:g} times the median of the {_WINDOW} steps before; the table counts the spikes "
            "of all seeds.",
            markdown_table(_HEAD, [_row(name, by_name) for name in by_name]),
            "The layer has no option for a constant lambda or a sketch; its conjugate gradient is a later one, "
            "with refinement. The experiment computes all three in PyTorch with the products of the chunk-wise "
            "form. A test runs this code without a change to the layer and compares it with the op: outputs and "
            "gradients agree. With lambda = 0.25, "
            "the Chebyshev nodes of a token cover the interval of this token, from lambda to ||S|| + lambda. "
            "The sketch is a learned map of each head to d dims; it starts orthonormal. Conjugate gradient uses "
            "as many products as the base, without refinement. Its gradient is implicit: conjugate gradient "
            "also solves the adjoint system.",
            _findings(by_name),
        )
    ).rstrip()


_HEAD = [
    "variant", "held-out loss", "difference from the base", "recall tokens", "training loss",
    "gradient norm, median", "largest", "spikes",
]  # fmt: skip
Results = dict[int, dict[str, Any]]  # by seed


def results_of(entries: Entries, name: str) -> Results:
    return {e["cell"]["seed"]: e["result"] for e in entries if e["cell"]["variant"] == name}


def _row(name: str, by_name: dict[str, Results]) -> list[str]:
    results = list(by_name[name].values())

    def of(measure: Callable[[dict[str, Any]], float | None], form: str) -> str:
        return spread([measure(result) for result in results], form)

    return [
        name,
        of(lambda r: held_out(r, "loss"), ".4f"),
        spread(list(beside(name, by_name).values()), "+.4f") if name != BASE else "",
        of(lambda r: held_out(r, "recall_loss"), ".4f"),
        of(_last_loss, ".4f"),
        of(lambda r: statistics.median(_finite(r)) if _finite(r) else None, ".3f"),
        of(lambda r: max(_finite(r), default=None), ".3g"),
        str(sum(len(result["spikes"]) for result in results)),
    ]


def held_out(result: dict[str, Any], name: str) -> float | None:
    return None if result["held out"] is None else result["held out"][name]


def _last_loss(result: dict[str, Any]) -> float | None:
    losses = [loss for _, loss in result["train loss"]]
    return None if result["diverged"] else statistics.fmean(losses[-max(1, len(losses) // 10) :])


def _finite(result: dict[str, Any]) -> list[float]:
    return [norm for norm in result["gradient norms"] if norm is not None]


def beside(name: str, by_name: dict[str, Results]) -> dict[int, float | None]:
    """The held-out loss minus that of the base, by seed; None if one of the two diverged."""
    base = by_name.get(BASE, {})
    found = {}
    for seed, result in by_name[name].items():
        if seed in base:
            ours, theirs = held_out(result, "loss"), held_out(base[seed], "loss")
            found[seed] = None if ours is None or theirs is None else ours - theirs
    return found


class Differences(NamedTuple):
    """Median differences of the held-out loss from the base, over the seeds; infinite if a training diverged.

    medians: of all variants; alike: those that solve the base's system, whose differences are chance;
    single, middle: the largest difference of those, of one seed and of a median.
    """

    medians: dict[str, float]
    alike: list[str]
    single: float
    middle: float


def differences(by_name: dict[str, Results]) -> Differences | None:
    """None without several seeds of the base and of a variant that solves its system."""
    apart: dict[str, list[float]] = {}
    for name in by_name:
        found = [math.inf if x is None else x for x in beside(name, by_name).values()]
        if name != BASE and len(found) > 1:
            apart[name] = found
    alike = [name for name in _ALIKE if name in apart]
    seeds = [abs(x) for name in alike for x in apart[name] if math.isfinite(x)]
    if not seeds:
        return None
    medians = {name: statistics.median(found) for name, found in apart.items()}
    middle = max((abs(medians[name]) for name in alike if math.isfinite(medians[name])), default=0.0)
    return Differences(medians, alike, max(seeds), middle)


def _findings(by_name: dict[str, Results]) -> str:
    """The variants that differ from the base by more than chance, if there are several seeds; expectations."""
    found = differences(by_name)
    if found is None:
        return ""
    alike, single, median = found.alike, found.single, found.middle
    others = {name: x for name, x in found.medians.items() if name not in alike}
    sides = {
        "worse than the base by more than any of these seeds": [n for n, x in others.items() if x > single],
        "better than the base by more than any of these seeds": [n for n, x in others.items() if -x > single],
        "worse by more than these medians": [n for n, x in others.items() if single >= x > median],
        "better by more than these medians": [n for n, x in others.items() if single >= -x > median],
        "no difference beyond these medians": [n for n, x in others.items() if abs(x) <= median],
    }
    said = "; ".join(f"{side}: {_listed(names)}" for side, names in sides.items() if names)
    spiky = [
        f"{sum(len(r['spikes']) for r in results.values())} with {_listed([name])}"
        for name, results in by_name.items()
        if any(r["spikes"] for r in results.values())
    ]
    return (
        f"How large are random differences? {_listed(alike)} solve the same system as the base, so their "
        f"differences from it are random. Single seeds differ from the base by up to {single:.3f}, medians by up "
        f"to {median:.3f}. Medians of the other variants: {said}. Spikes of the gradient norm: "
        f"{', '.join(spiky) or 'none'}. {_verdicts(by_name, median)}. The models of the paper have at least 440 "
        "million parameters. The paper reports loss spikes with a constant lambda, and worse long-context "
        "results without alpha. Windows of this length cannot show the second effect."
    )


def _verdicts(by_name: dict[str, Results], chance: float) -> str:
    """The expectations, and the results."""

    def spiked(name: str) -> bool:
        return any(result["spikes"] for result in by_name[name].values())

    verdict = "refuted" if spiked(BASE) else "confirmed"
    said = f"Expected: no spikes with the base, whose ridge is adaptive. Result: {verdict}"
    if _CONSTANT in by_name:
        said += f". A constant lambda has {'spikes' if spiked(_CONSTANT) else 'no spikes here either'}"
    wide = [-x for x in beside(_FLOAT32, by_name).values() if x is not None] if _FLOAT32 in by_name else []
    if wide:
        more = statistics.median(wide)
        verdict = "no difference beyond chance" if abs(more) <= chance else "refuted" if more > 0 else "confirmed"
        said += (
            ". Expected: the base (bfloat16 with refinement) is not worse than float32. Result: "
            f"{verdict}, {spread(wide, '+.4f')}"
        )
    return said


def _listed(names: Sequence[str]) -> str:
    """A list of quoted names; the names may contain commas."""
    return ", ".join(f'"{name}"' for name in names)


_CURVES = {
    BASE: "#1d3557", "no forget gate": "#b8860b", "steps (31,)": "#7aa6c2", "steps (8,)": "#2a9d8f",
    _CONSTANT: "#c8553d", "conjugate gradient": "#7b4f9d",
}  # fmt: skip


def _draw(by_name: dict[str, Results], path: Path) -> None:
    figure, (losses, norms) = new_panels(1, 2, (13, 5.0), 120)
    others = [name for name in by_name if name != BASE]
    for place, name in enumerate(others):
        found = [x for x in beside(name, by_name).values() if x is not None]
        losses.plot(found, [place] * len(found), "o", color="#c8553d", markersize=4, alpha=0.7)
        if found:
            losses.plot([statistics.median(found)], [place], "|", color="#1d3557", markersize=14)
    losses.axvline(0.0, color="#1d3557", linewidth=1.0)
    losses.set_yticks(range(len(others)), others, fontsize=8)
    losses.invert_yaxis()
    losses.set_xlabel("nats per token")
    losses.set_title("held-out loss beside the base, by seed and median", loc="left", fontsize=11)
    for name in [name for name in by_name if name in _CURVES]:
        runs = [result["gradient norms"] for result in by_name[name].values()]
        largest = [max((x for x in column if x is not None), default=math.nan) for column in zip_longest(*runs)]
        steps = range(1, 1 + len(largest))
        norms.plot(steps, largest, color=_CURVES[name], linewidth=0.9, label=name)
    norms.set_yscale("log")
    norms.set_xlabel("step")
    norms.set_title("gradient norm, largest of the seeds", loc="left", fontsize=11)
    norms.legend(frameon=False, fontsize=8)
    save(figure, path)
