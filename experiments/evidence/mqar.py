"""Accuracy on multi-query associative recall against model dim, for all mixers.

The grid is the grid of figure 3a of arXiv 2511.21016. The layer of that figure has no gates and no alpha
connection; here both are on. The grid has 128 to 1024 tokens, up to a quarter as many key-value pairs, and model
dims 32 to 256. Up to dim 128, the longer sequences have more pairs than dims. One training is used for all
settings of a dim. Its batches have the same number of tokens and contain sequences of 64 to 1024 tokens, with
pairs from 4 up to a quarter of the tokens. Mixed lengths follow Based (arXiv 2402.18668): a model learns from
short sequences what long ones require. The model is then tested at every setting separately.

Models have two layers of two heads, and of four heads at dim 256, because no head has more than 64 dims. They have
equal parameters (`skeleton.py`) and read the same batches in the same order. Every mixer is first trained with the
same four learning rates and the first seed. The rate with the best mean accuracy is used for the other seeds.
Initial weights have a standard deviation of 0.02, as in Zoology. With the usual weights of `skeleton.py`, softmax
attention did not learn the task.

Legend: T tokens of a sequence, P pairs.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainingArguments, set_seed

from gka.hf import GKAConfig, GKAForCausalLM
from gka.training.trainer import on_one_gpu

from ..tasks.mqar import IGNORE, make_mqar
from ..tasks.mqar_options import ALL_MIXERS
from ..tasks.mqar_train import LAYERS, RecallTrainer, answers, state_size
from .mqar_page import mean_accuracy, page_text
from .record import Cell, Record
from .skeleton import skeleton

SUMMARY = "accuracy on multi-query associative recall against model dim"
BY_MACHINE = False
HEADS, WIDEST_HEAD = 2, 64
FIRST_WEIGHTS = 0.02  # standard deviation, as in Zoology; softmax attention needs small ones for this task
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
Entries = list[dict[str, Any]]
Task = tuple[int, int]  # T, P
FULL: dict[str, Any] = dict(
    vocab_size=8192, longest=1024, steps=4000, batch_tokens=16_384, pool=64, test_tokens=65_536
)
SMALL: dict[str, Any] = dict(vocab_size=256, longest=128, steps=8, batch_tokens=256, pool=2, test_tokens=256)


def training_tasks(longest: int) -> list[Task]:
    """T from a sixteenth of `longest`, P from 4 (less in the shortest) to T / 4, both doubling."""
    lengths = [longest >> shift for shift in range(4, -1, -1)]
    first = min(4, lengths[0] // 4)
    return [(T, first << shift) for T in lengths for shift in range((T // 4 // first).bit_length())]


def tested_tasks(longest: int) -> list[Task]:
    """T from an eighth of `longest`, doubling, with a sixteenth, an eighth and a quarter as many pairs."""
    return [(T, T // part) for T in (longest // 8, longest // 4, longest // 2, longest) for part in (16, 8, 4)]


def cells(size: str) -> list[Cell]:
    """For every dim and mixer, first the rates, then the other seeds. Small: one dim, two rates, two seeds."""
    small = size == "small"
    dims, rates, seeds = ((32,), RATES[1:3], SEEDS[:2]) if small else ((32, 64, 128, 256), RATES, SEEDS)
    rest = SMALL if small else FULL
    found: list[Cell] = []
    for dim, mixer in itertools.product(dims, ALL_MIXERS):
        place = {"mixer": mixer, "dim": dim, **rest}
        found += [{**place, "seed": seeds[0], "learning_rate": rate} for rate in rates]
        found += [{**place, "seed": seed, "rates": list(rates)} for seed in seeds[1:]]
    return found


def run(cell: Cell, folder: Path, device: torch.device) -> Any:
    """Train a model and test it on new sequences."""
    rate = cell["learning_rate"] if "learning_rate" in cell else _best_rate(folder.parents[1], cell)
    set_seed(cell["seed"])
    config = model_config(cell, cell["mixer"])
    model = GKAForCausalLM(config)
    trainer = RecallTrainer(
        model=model,
        args=_arguments(cell, rate, folder, device),
        train_dataset=Batches(cell),
        data_collator=_only,
    )
    trainer.remove_callback(PrinterCallback)
    diverged = None
    try:
        trainer.train()
    except FloatingPointError:
        diverged = trainer.state.global_step
    tasks = tested_tasks(cell["longest"])
    return {
        "learning_rate": rate,
        "accuracy": [[T, P, 0.0 if diverged is not None else _accuracy(model, cell, T, P)] for T, P in tasks],
        "loss": [
            [entry["step"], round(entry["loss"], 5)] for entry in trainer.state.log_history if "loss" in entry
        ],
        "diverged": diverged,
        "parameters": model.num_parameters(),
        "state_size": state_size(config, cell["longest"]),
    }


def model_config(cell: Cell, mixer: str, **fields: Any) -> GKAConfig:
    """The model of a cell with a mixer; fields of GKAConfig replace those of the experiment."""
    sizes: dict[str, Any] = dict(
        vocab_size=cell["vocab_size"],
        hidden_size=cell["dim"],
        intermediate_size=2 * cell["dim"],
        num_hidden_layers=LAYERS,
        num_attention_heads=max(HEADS, cell["dim"] // WIDEST_HEAD),
        max_position_embeddings=cell["longest"],
        initializer_range=FIRST_WEIGHTS,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return skeleton(mixer, **(sizes | fields))


class Batches(Dataset[dict[str, Tensor]]):
    """The batches of a training, one per item; the same for every mixer.

    There are `pool` batches of each task. Each step draws a task and one of its batches uniformly.

    Args:
        cell: a cell of the experiment.
    """

    def __init__(self, cell: Cell) -> None:
        tasks, pool, tokens = training_tasks(cell["longest"]), cell["pool"], cell["batch_tokens"]
        random = torch.Generator().manual_seed(cell["seed"])
        self.order = torch.randint(len(tasks) * pool, (cell["steps"],), generator=random).tolist()
        self.pool = pool
        self.made = [
            make_mqar(pool * max(1, tokens // T), seq_len=T, num_pairs=P, vocab_size=cell["vocab_size"], seed=n)
            for n, (T, P) in enumerate(tasks, len(tasks) * cell["seed"])
        ]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        task, number = divmod(self.order[step], self.pool)
        rows = len(self.made[task].inputs) // self.pool
        part = slice(number * rows, (number + 1) * rows)
        return {"input_ids": self.made[task].inputs[part], "labels": self.made[task].labels[part]}


def _only(items: list[Any]) -> Any:
    (item,) = items
    return item


def _arguments(cell: Cell, rate: float, folder: Path, device: torch.device) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=cell["steps"],
        per_device_train_batch_size=1,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=cell["steps"] // 20,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        seed=cell["seed"],
        data_seed=cell["seed"],
        use_cpu=device.type == "cpu",
        logging_steps=max(1, cell["steps"] // 40),
        logging_nan_inf_filter=False,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
    )
    return on_one_gpu(arguments)


@torch.no_grad()
def _accuracy(model: GKAForCausalLM, cell: Cell, T: int, P: int) -> float:
    """The fraction of correct answers to the queries in the test sequences of a task."""
    model.eval()
    device = model.device
    rows = max(1, cell["batch_tokens"] // T)
    test = make_mqar(
        max(1, cell["test_tokens"] // T), seq_len=T, num_pairs=P, vocab_size=cell["vocab_size"], split="test"
    )
    right = 0
    for inputs, labels in zip(test.inputs.split(rows), test.labels.split(rows), strict=True):
        asked = (labels != IGNORE).to(device)
        said = answers(model, inputs.to(device), asked).argmax(-1)
        right += int((said == labels.to(device)[asked]).sum())
    return round(right / (P * len(test.inputs)), 5)


def _best_rate(output: Path, cell: Cell) -> float:
    """The learning rate with the best mean accuracy for the first seed. UserError if a training is missing."""
    same = {name: value for name, value in cell.items() if name not in ("seed", "rates")}
    return Record(output / "mqar.json", "mqar").best_rate(same, cell["rates"], lambda entry: -mean_accuracy(entry))


# The page


def section(entries: Entries, picture: Path) -> str:
    """All tables and the text about them; draws the picture."""
    cell = entries[0]["cell"]
    described = (
        "How many key/value pairs can a model recall? A sequence lists pairs, then asks for the value of "
        f"each key. The models have {LAYERS} layers with {HEADS} heads; wider models have more heads, since "
        f"no head has more than {WIDEST_HEAD} dims. The vocabulary has {cell['vocab_size']} tokens. One "
        f"training has {cell['steps']} steps of {cell['batch_tokens']:,} tokens, in float32, with sequences "
        f"of {training_tasks(cell['longest'])[0][0]} to {cell['longest']} tokens. The gates and the alpha "
        "connection of GKA are on."
    )
    return page_text(entries, picture, described)
