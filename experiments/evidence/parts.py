"""Which part of the layer costs recall: models of the mqar experiment that differ from the default in one thing.

In the mqar experiment GKA is clearly worse than GLA, the same layer without the solve, with 1024 tokens, 256
pairs and dim 128. Here the same models train on the same batches, in another order, with the same schedule. They
train in bfloat16, as the layer is used; that experiment has float32. changes.py has the variants. Whatever a
variant shares with the default starts with the weights of the default. So the first decays, which are random and
differ widely between the few heads, are the same.

On a GPU, steps are replayed (experiments/tasks/mqar_replay.py). There are two learning rates: the best two of GKA
at dim 128 in mqar.json, which are also the best of GKA and the best of GLA at dim 64. All variants are first
trained with the first rate and the first seed. The second rate is needless for a variant that with the first is at
least as accurate, in the mean over the settings, as the default and GLA with their better rates; these two have
both rates, and come first. The other seeds use the better rate of the first seed.

Legend: T tokens of a sequence, P pairs. A setting is a pair (T, P).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from gka.hf import GKAForCausalLM

from ..tasks.asked import Asked, accuracy, asked
from ..tasks.gates import gates_of
from ..tasks.mqar import make_mqar
from ..tasks.mqar_replay import logits_of, training
from ..tasks.stepwise import Stepwise, finish
from . import mqar
from .changes import BASE, NO_SOLVE, PAPER, VARIANTS
from .parts_page import section as section
from .record import Cell, Record
from .starts import start_from

SUMMARY = "which part of the layer costs recall"
BY_MACHINE = False
Entries = list[dict[str, Any]]
DIMS, SEEDS, RATES = (128, 64), (0, 1, 2), (1e-3, 3e-3)
_SMALL = (BASE, NO_SOLVE, "no forget gate", "alpha starts at 0.88", "dt starts 10 times smaller", PAPER, "float32")
_GROUP = ("variant", "dim", "size")
_DATA = ("seed", "vocab_size", "longest", "steps", "batch_tokens", "pool")


def cells(size: str) -> list[Cell]:
    """For every dim: the first rate, the second, the other seeds. Small: one dim, two seeds, some variants."""
    small = size == "small"
    dims, seeds, names = ((32,), SEEDS[:2], _SMALL) if small else (DIMS, SEEDS, tuple(VARIANTS))
    kinds: list[Cell] = [{"seed": seeds[0], "learning_rate": rate} for rate in RATES]
    others: list[Cell] = [{"seed": seed, "rates": list(RATES)} for seed in seeds[1:]]
    orders = [(names[:2], kinds), (names[2:], kinds), (names, others)]
    rest = mqar.SMALL if small else mqar.FULL
    return [
        {"variant": name, "dim": dim, **kind, "dtype": VARIANTS[name].dtype, **rest}
        for dim in dims
        for of_these, each in orders
        for kind in each
        for name in of_these
    ]


def ready(cell: Cell, entries: Entries) -> bool | None:
    """Whether a cell may run now: True, False for later, None if other results make it needless."""
    if cell.get("learning_rate") == RATES[0]:
        return True
    second = _second_rate(cell, entries)
    if "learning_rate" in cell:
        return second
    done = len(_tried(cell, entries)) == len(RATES)
    return done or second is None


def _second_rate(cell: Cell, entries: Entries) -> bool | None:
    """Whether the second rate of a variant may run, as `ready`."""
    first = _tried(cell, entries).get(RATES[0])
    if first is None:
        return False
    if cell["variant"] in (BASE, NO_SOLVE):
        return True
    rivals = [_tried({**cell, "variant": name}, entries) for name in (BASE, NO_SOLVE)]
    if any(len(rates) < len(RATES) for rates in rivals):
        return False
    best = max(max(rates.values()) for rates in rivals)
    return None if first >= best and first > 0 else True


def _tried(cell: Cell, entries: Entries) -> dict[float, float]:
    """The mean accuracy of each rate that was tried with the variant and dim of a cell."""
    wanted = [cell.get(name) for name in _GROUP]
    return {
        entry["cell"]["learning_rate"]: statistics.mean(a for _, _, a in entry["result"]["accuracy"])
        for entry in entries
        if "learning_rate" in entry["cell"] and [entry["cell"].get(name) for name in _GROUP] == wanted
    }


def run(cell: Cell, folder: Path, device: torch.device) -> Any:
    """Run `stepwise` to its end."""
    return finish(stepwise(cell, folder, device), device)


def stepwise(cell: Cell, folder: Path, device: torch.device) -> Stepwise:
    """Train a model, test it on new sequences, and read its gates before and after."""
    if "learning_rate" in cell:
        rate = cell["learning_rate"]
    else:
        tried = _tried(cell, Record(folder.parents[1] / "parts.json", "parts").entries)
        rate = max(tried, key=tried.__getitem__)
    model = build(cell).to(device)  # type: ignore[arg-type]  # transformers wraps it
    tests = _tests(cell["longest"], cell["test_tokens"], cell["vocab_size"], device)
    hardest = max(tests)
    some = tests[hardest].inputs[: max(1, cell["batch_tokens"] // hardest[0])]
    before = gates_of(model, some)
    batches = _batches(cell, device)
    outcome = yield from training(
        model,
        batches,
        steps=cell["steps"],
        learning_rate=rate,
        dtype=cell["dtype"],
        device=device,
        name=cell["variant"],
    )
    finite = outcome["diverged"] is None

    def accuracy_at(T: int, examples: Asked) -> float:
        return accuracy(model, logits_of, examples, max(1, cell["batch_tokens"] // T), cell["dtype"])

    found = [[T, P, accuracy_at(T, test) if finite else 0.0] for (T, P), test in tests.items()]
    after = gates_of(model, some) if finite else None
    return {"learning_rate": rate, "accuracy": found, **outcome, "gates": {"first": before, "trained": after}}


def build(cell: Cell) -> GKAForCausalLM:
    """The model of a cell with initial weights: those of the default, where it has the same parts."""
    part = VARIANTS[cell["variant"]]

    def fresh(mixer: str, **fields: Any) -> GKAForCausalLM:
        set_seed(cell["seed"])
        return GKAForCausalLM(mqar.model_config(cell, mixer, **fields))

    model, default = fresh(part.mixer, **part.fields), fresh("gka").state_dict()
    shared = {name: default[name] for name in model.state_dict() if name in default}
    if len(shared) < len(default):  # else the same random numbers have made both
        model.load_state_dict(shared)
    start_from(model, part.start)
    return model


def _batches(cell: Cell, device: torch.device) -> Iterator[Asked]:
    """The batches of the mqar experiment, on the device; its Trainer shuffles their order once more."""
    order, tasks = _examples(tuple(cell[name] for name in _DATA), device)

    def batch(index: int) -> Asked:
        task, number = divmod(index, cell["pool"])
        rows = len(tasks[task].inputs) // cell["pool"]
        part = slice(number * rows, (number + 1) * rows)
        return Asked(*(x[part] for x in tasks[task]))

    return map(batch, order)


@lru_cache(maxsize=len(SEEDS))
def _examples(sizes: tuple[Any, ...], device: torch.device) -> tuple[list[int], list[Asked]]:
    """The order of the batches, and all examples of every task; cells of a process share them."""
    made = mqar.Batches(dict(zip(_DATA, sizes, strict=True)))
    return made.order, [asked(examples, examples.inputs.shape[1] // 4, device) for examples in made.made]


@lru_cache(maxsize=1)
def _tests(longest: int, tokens: int, vocab_size: int, device: torch.device) -> dict[tuple[int, int], Asked]:
    """The test sequences of every setting, those of the mqar experiment."""
    made = {
        (T, P): make_mqar(max(1, tokens // T), seq_len=T, num_pairs=P, vocab_size=vocab_size, split="test")
        for T, P in mqar.tested_tasks(longest)
    }
    return {task: asked(examples, task[1], device) for task, examples in made.items()}
