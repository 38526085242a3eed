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

from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from gka.cli.loading import write_checkpoint
from gka.hf import GKAConfig, GKAForCausalLM

from . import corpus as text
from .lm_page import ALL, FULL, MEASURED, held_out_loss
from .lm_page import section as section
from .record import Cell, Record
from .skeleton import skeleton
from .training import train_on_text

SUMMARY = "language models of equal size on the same text"
BY_MACHINE = False
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
ROUNDS = 3  # of speed
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
        return {name: trained.as_dict()[name] for name in MEASURED}
    found = {
        "learning_rate": rate,
        "parameters": model.num_parameters(),
        "intermediate_size": config.intermediate_size,
        **{name: value for name, value in trained.as_dict().items() if name not in MEASURED},
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
