"""Language models with one skeleton and different mixers, trained on the same text.

Each model has eight blocks of hidden size 384, six heads of 64 dims, a vocabulary of 8192 tokens with tied
embeddings, and about 18 million parameters, equal within 2% (skeleton.py). "hybrid" is GKA with softmax attention
in every sixth block. All models read the same tokens in the same order, in bfloat16. Every mixer is first trained
with the same four learning rates on an eighth of the tokens. The rate with the lowest held-out loss is then used
for new trainings on all tokens, with three seeds. The seed decides the initial weights and the order of the text.
The model of the first seed is kept in OUTPUT/lm-models/SIZE/MIXER for other experiments, e.g. `long`.

Separate short trainings, "part=speed", measure speed and memory. They can run later on an otherwise idle GPU, with
`--only part=speed`. The mixers take turns, three times each, so that a drift of the machine affects all of them.

Held-out files are read in windows with the length of the training windows. The results are the loss and bits per
byte, the loss by position, and the loss of recall tokens, whose bigram occurs earlier in the window
(experiments/tasks/recall_loss.py).
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from gka.cli.loading import write_checkpoint
from gka.hf import GKAConfig, GKAForCausalLM

from ..peers import GPU_MIXERS, MIXERS
from ..tasks.mqar_report import STYLE as MIXER_STYLE
from . import corpus as text
from .picture import draw_band, new_panels, save
from .record import Cell, Record
from .skeleton import skeleton
from .table import markdown_table, span, spread
from .training import SPEED, train_on_text

SUMMARY = "language models of equal size on the same text"
BY_MACHINE = False
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
ROUNDS = 3  # of speed
ALL = (*MIXERS, "hybrid")
FULL = (*ALL, *GPU_MIXERS)  # those of the full size
STYLE = {**MIXER_STYLE, "hybrid": ("hybrid of GKA and softmax attention", "#7b4f9d", "P")}
Entries = list[dict[str, Any]]
BySeed = dict[str, dict[int, dict[str, Any]]]  # models by mixer and seed
_SPEED = (SPEED, "peak bytes")
_SIZES: dict[str, dict[str, Any]] = {
    "small": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2),
    "full": dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6),
}
_TRAINING: dict[str, dict[str, Any]] = {
    "small": dict(
        seq_len=64, batch_size=2, tokens=768, search_tokens=256, speed_tokens=512, eval_bytes=4_000,
        dtype="float32",
    ),
    "full": dict(
        seq_len=2048, batch_size=8, tokens=50_000_000, search_tokens=6_250_000, speed_tokens=1_000_000,
        eval_bytes=2_000_000, dtype="bfloat16",
    ),
}  # fmt: skip

prepare = text.prepare


def cells(size: str) -> list[Cell]:
    """Learning rates and first model of every mixer, then all speeds, then the other seeds.

    Small: two rates and one seed.
    """
    training = dict(_TRAINING[size])
    tokens, search_tokens, speed_tokens = (
        training.pop(name) for name in ("tokens", "search_tokens", "speed_tokens")
    )
    rates = RATES if size == "full" else RATES[1:3]
    rest = {**_SIZES[size], **training, "seed": SEEDS[0]}
    found: list[Cell] = []
    mixers = FULL if size == "full" else ALL
    for mixer in mixers:
        search = [
            {"mixer": mixer, "part": "rate", "learning_rate": rate, "tokens": search_tokens, **rest}
            for rate in rates
        ]
        model = {"mixer": mixer, "part": "model", "rates": list(rates), "tokens": tokens, **rest}
        found += [*search, model]
    models = [cell for cell in found if cell["part"] == "model"]
    speeds = [
        {"mixer": mixer, "part": "speed", "tokens": speed_tokens, "round": number, **rest}
        for number in range(ROUNDS if size == "full" else 1)
        for mixer in mixers
    ]
    others = SEEDS[1:] if size == "full" else ()
    return [*found, *speeds, *({**model, "seed": seed} for seed in others for model in models)]


def language_model(mixer: str, size: str, vocab_size: int, end: int, **changes: Any) -> GKAConfig:
    """The configuration of the model with a mixer or of "hybrid"; `end` is the end-of-text token.

    changes: fields of GKAConfig besides those of the experiment.
    """
    fields: dict[str, Any] = dict(
        **changes,
        **_SIZES[size],
        vocab_size=vocab_size,
        max_position_embeddings=_TRAINING[size]["seq_len"],
        tie_word_embeddings=True,
        eos_token_id=end,
        bos_token_id=end,
    )
    if mixer != "hybrid":
        return skeleton(mixer, **fields)
    kinds = ["linear_attention"] * _SIZES[size]["num_hidden_layers"]
    every = min(6, len(kinds))
    kinds[every - 1 :: every] = ["full_attention"] * len(kinds[every - 1 :: every])
    return skeleton("gka", **fields, layer_types=kinds)


def model_folder(output: Path, size: str, mixer: str) -> Path:
    """The folder of the trained model with a mixer."""
    return output / "lm-models" / size / mixer


def run(cell: Cell, folder: Path, device: torch.device) -> Any:
    """Train a model and measure its loss on held-out text."""
    output, size = folder.parents[1], cell["size"]
    data = text.Corpus.load(output, size)
    rate = _rate(output, cell)
    set_seed(cell["seed"])
    config = language_model(cell["mixer"], size, len(data.tokenizer), data.tokenizer.eos_token_id)
    model = GKAForCausalLM(config)
    trained, held_out = train_on_text(
        model,  # type: ignore[arg-type]
        data,
        cell,
        folder,
        learning_rate=rate,
        eval_bytes={"model": cell["eval_bytes"], "rate": cell["eval_bytes"] // 4}.get(cell["part"]),
        device=device,
        log_every=10 if size == "full" else 1,
    )
    if cell["part"] == "speed":  # too short to learn anything
        return {name: trained.as_dict()[name] for name in _SPEED}
    found = {
        "learning_rate": rate,
        "parameters": model.num_parameters(),
        "intermediate_size": config.intermediate_size,
        **{name: value for name, value in trained.as_dict().items() if name not in _SPEED},
        "held out": None if held_out is None else held_out.as_dict(),
    }
    if held_out is not None and cell["part"] == "model":
        found["corpus"] = data.describe()
        if cell["seed"] == SEEDS[0]:
            target = model_folder(output, size, cell["mixer"])
            write_checkpoint(model, data.folder / "tokenizer", target, overwrite=True)
    return found


def _rate(output: Path, cell: Cell) -> float:
    """The learning rate of a cell; for a full training, the rate of the best short training."""
    if cell["part"] != "model":
        return cell.get("learning_rate", RATES[0])  # type: ignore[no-any-return]
    same = {"part": "rate", "seed": SEEDS[0], **{name: cell[name] for name in ("mixer", "size", "corpus")}}
    return Record(output / "lm.json", "lm").best_rate(same, cell["rates"], held_out_loss)


def held_out_loss(entry: dict[str, Any]) -> float:
    held_out = entry["result"]["held out"]
    return float("inf") if held_out is None else float(held_out["loss"])


# The page


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
    speeds, peaks = ([found[name] for found in rounds if found[name] is not None] for name in _SPEED)
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
