"""Why the language models of GKA differ from seed to seed: what scatters, and when.

In the lm experiment the held-out losses of three seeds differed by 0.06 nats with GKA, 0.026 with Gated DeltaNet
and 0.004 with softmax attention. With the corrected gradient of GKA's forget gate they differ by 0.027. Here the
same models train on fewer tokens, with the best learning rate of lm.json, which is 0.003 for all four mixers.
Controls change one thing each:

    other weights          the order of the text of seed 0, the first weights of other seeds
    other order            the first weights of seed 0, the order of the text of other seeds
    changed by 1e-6        weights and order of seed 0; every first weight times 1 + 1e-6 z, z normal
    no forget gate, no alpha connection       three seeds of weights and order, as for the mixers

If a change by 1e-6 scatters the loss as much as another seed, the training may amplify any small difference, and
neither the weights nor the order of a seed need be the cause. Three seeds leave much to chance: seeds_page.py has
the rules and how often they err. A training records the gradient norms of A_log, dt_bias,
the projections of the gates and the rest of every block before clipping, the held-out loss at five steps, and at
the end the loss of the first 64 tokens of the windows apart from that of later ones.

On one H100, 50 million tokens took 333 s with GKA, 325 s with GLA, 477 s with Gated DeltaNet and 277 s with
softmax attention (lm.json, the shortest of the seeds). The 26 trainings here, 15 with GKA, 3 with GLA, 5 with
Gated DeltaNet and 3 with attention, would take 9,186 s. With 15 million tokens that is 2,756 s, or 23 minutes on
two GPUs with one process each. Most of the time the GPU waits for Python, so several processes on a GPU take less.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import set_seed

from gka.hf import GKAForCausalLM

from ..tasks.recall_loss import RecallLoss
from . import corpus as text
from .lm import language_model
from .record import Cell
from .seeds_page import section as section
from .training import Trained, steps_of, train_on_text
from .watch import HELD_OUT, NORMS, Watch, groups_of

SUMMARY = "why language models differ between seeds"
BY_MACHINE = False
Entries = list[dict[str, Any]]
NUDGE = 1e-6
_AT = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the steps; then the held-out loss is measured
_TRAINING: dict[str, dict[str, Any]] = {
    "small": dict(
        seq_len=64, batch_size=2, tokens=768, eval_bytes=4_000, first_tokens=16, dtype="float32", log_every=2,
    ),
    "full": dict(
        seq_len=2048, batch_size=8, tokens=15_000_000, eval_bytes=2_000_000, first_tokens=64, dtype="bfloat16",
        log_every=20,
    ),
}  # fmt: skip


class Kind(NamedTuple):
    """The model of a training: its mixer, and fields of GKAConfig."""

    mixer: str
    fields: dict[str, Any]


KINDS = {
    "GKA": Kind("gka", {}),
    "Gated DeltaNet": Kind("gdn", {}),
    "softmax attention": Kind("attention", {}),
    "GLA (no solve)": Kind("gla", {}),
    "GKA, no forget gate": Kind("gka", {"use_forget_gate": False}),
    "GKA, no alpha connection": Kind("gka", {"use_alpha_connection": False}),
}
_NUDGED = ("GKA", "Gated DeltaNet")

prepare = text.prepare


def cells(size: str) -> list[Cell]:
    """First all models with their own seeds, one seed after the other, then the controls. Small: two seeds."""
    seeds = (0, 1) if size == "small" else (0, 1, 2)
    kinds = [name for name, kind in KINDS.items() if size == "full" or kind.mixer != "gdn"]
    first, others = seeds[0], seeds[1:]
    trainings = [(name, seed, seed, 0) for seed in seeds for name in kinds]
    trainings += [("GKA", weights, first, 0) for weights in others]
    trainings += [("GKA", first, order, 0) for order in others]
    trainings += [(name, first, first, nudge) for nudge in others for name in _NUDGED if name in kinds]
    names = ("kind", "weights", "order", "nudge")
    return [
        {**dict(zip(names, training, strict=True)), "learning_rate": 3e-3, **_TRAINING[size]}
        for training in trainings
    ]


def ready(cell: Cell, entries: Entries) -> bool:
    """Every cell may run at any time."""
    return True


def run(cell: Cell, folder: Path, device: torch.device) -> Any:
    """Train a model, watch its gradients, and measure its loss on held-out text."""
    data = text.Corpus.load(folder.parents[1], cell["size"])
    model = build(cell, len(data.tokenizer), data.tokenizer.eos_token_id)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it
    steps = steps_of(cell)

    def held_out_loss() -> float:
        found = text.evaluate(
            model,
            data,
            context=cell["seq_len"],
            max_bytes=cell["eval_bytes"] // 4,
            batch_size=cell["batch_size"],
            autocast=cell["dtype"] == "bfloat16",
        )
        return found.loss

    trained, held_out = train_on_text(
        model,  # type: ignore[arg-type]
        data,
        {**cell, "seed": cell["order"]},
        folder,
        learning_rate=cell["learning_rate"],
        eval_bytes=cell["eval_bytes"],
        device=device,
        log_every=cell["log_every"],
        callbacks=[Watch(model, held_out_loss, [max(1, round(part * steps)) for part in _AT])],
    )
    return {
        "parameters": model.num_parameters(),
        **_outcome(trained),
        "groups": [list(group) for group in groups_of(model)],
        **({} if held_out is None else losses(held_out, cell["first_tokens"])),
    }


def build(cell: Cell, vocab_size: int, end: int) -> GKAForCausalLM:
    """The model of a cell with initial weights."""
    kind = KINDS[cell["kind"]]
    set_seed(cell["weights"])
    model = GKAForCausalLM(language_model(kind.mixer, cell["size"], vocab_size, end, **kind.fields))
    if cell["nudge"]:
        nudge(model, cell["nudge"])
    return model


@torch.no_grad()
def nudge(model: nn.Module, seed: int) -> None:
    """Multiply every weight by 1 + NUDGE z, z normal."""
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.mul_(1 + NUDGE * torch.randn(parameter.shape, generator=random).to(parameter.device))


def losses(held_out: RecallLoss, first_tokens: int) -> dict[str, float | None]:
    """The held-out loss in nats per token: of all tokens, of the first ones of the windows, of the later ones.

    first_tokens: a power of two; None stands for no such token.
    """
    parts = {
        "loss": held_out.positions,
        "first tokens": [part for part in held_out.positions if part.last < first_tokens],
        "later tokens": [part for part in held_out.positions if part.first >= first_tokens],
    }
    found = {}
    for name, bins in parts.items():
        count = sum(part.tokens for part in bins)
        found[name] = math.fsum(part.nats for part in bins) / count if count else None
    return found


def _outcome(trained: Trained) -> dict[str, Any]:
    """What a training has recorded, as JSON takes it: None for numbers that are not finite."""
    return {
        "diverged": trained.diverged,
        "train loss": trained.loss,
        "gradient norms": [[step, _short(norm)] for step, norm in trained.grad_norms],
        "group norms": [
            [entry["step"], [_short(norm) for norm in entry[NORMS]]] for entry in trained.history if NORMS in entry
        ],
        "held out": [
            [entry["step"], _short(entry[HELD_OUT], 6)] for entry in trained.history if HELD_OUT in entry
        ],
    }


def _short(value: float, digits: int = 3) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
