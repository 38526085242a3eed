"""The 440M recipe with GKA, Gated DeltaNet and softmax attention: equal tokens, equal parameters, several GPUs.

    torchrun --nproc_per_node 4 -m experiments evidence large --size full --minutes 9 --output runs/evidence

The model is that of configs/440m.yaml, with its learning rate and warm-up, in windows of 4096 tokens and steps of
32 windows. The small size is a small model, which runs on CPUs. The text is that of all installed Python packages
(packages.py), with a vocabulary of 32,000 learnt from the training files.

    part=plan      a few steps of each mixer; the seconds of a step and `--budget` decide the number of steps
    part=model     one training with a mixer, the same tokens in the same order; then the held-out loss

A training that is stopped, by `--minutes` or by a signal, resumes from its checkpoint with the next start of the
same command. The losses are those of an undisturbed training. Any number of GPUs that divides 32 may resume it.

A mixer whose kernels or package do not work here is left out by the plan, which keeps the reason. GKA must work.
The models are kept in OUTPUT/large-models/SIZE/MIXER.
"""

from __future__ import annotations

import gc
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from gka.cli.loading import write_checkpoint
from gka.hf.recipe import read_recipe
from gka.training.errors import UserError

from ..tasks.recall_loss import sum_nats, token_nats
from . import corpus as text
from .ablations import spikes
from .large_page import draw, latest, page_text
from .large_training import MODEL_FIELDS, new_model, step_seconds, train_to_steps
from .mfu import peak_of, step_flops
from .packages import package_folders, write_package_text
from .record import Cell, Record
from .together import is_first, processes

SUMMARY = "a 440M model with three mixers on several GPUs"
BY_MACHINE = True
OPTIONS = ("budget",)
RECIPE = Path(__file__).parents[2] / "configs" / "440m.yaml"
BUDGET = {"small": 0.1, "full": 20.0}  # minutes
SHARE = 0.88  # of the budget for steps; the rest is for checkpoints and held-out losses
_SAVE_SECONDS = 180  # between two checkpoints; one of the 440M model has 5.5 GB
_MIXERS = {"small": ("gka", "gdn", "attention"), "full": ("gka", "gdn_fla", "attention")}
_TRAINING: dict[str, dict[str, Any]] = {
    "small": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, head_dim=32, seq_len=64,
        sequences=4, dtype="float32", loss_chunk=128, eval_bytes=4_000,
    ),
    "full": dict(seq_len=4096, sequences=32, dtype="bfloat16", loss_chunk=2048, eval_bytes=2_000_000),
}  # fmt: skip
_LINE_END = "\n"
_PEERS = {
    "gka": "gka",
    "attention": "attention",
}  # names in benchmarks/bench_model.py; the others are Gated DeltaNet


def cells(size: str) -> list[Cell]:
    """The plan, then one training of each mixer."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    sizes = {name: value for name, value in read_recipe(RECIPE).items() if name in MODEL_FIELDS}
    common = {"learning_rate": float(recipe["learning_rate"]), "warmup": recipe["warmup"], "seed": 0}
    common |= sizes | _TRAINING[size]
    models = [{"part": "model", "mixer": mixer, **common} for mixer in _MIXERS[size]]
    return [{"part": "plan", "mixers": list(_MIXERS[size]), **common}, *models]


def prepare(output: Path, size: str, data: Sequence[str] | None, budget: float | None = None) -> dict[str, Any]:
    """Make the text if it does not exist; returns its fingerprint and the budget in minutes.

    Args:
        output, size: as in corpus.py.
        data: text files and folders in place of the installed packages.
        budget: minutes of training; None means those of the latest plan, or BUDGET.
    """
    name = f"large-{size}"
    if data is None and not (text.corpus_folder(output, name) / "corpus.json").is_file():
        roots = package_folders()
        if size == "small":
            roots = [Path(sysconfig.get_paths()["stdlib"], package) for package in ("asyncio", "email", "json")]
        folder = output / f"package-text-{size}"
        write_package_text(folder, roots)
        data = [str(folder)]
    if budget is None:
        planned = [e["cell"]["budget"] for e in _plans(output) if e["cell"]["size"] == size]
        budget = planned[-1] if planned else BUDGET[size]
    return {**text.prepare(output, name, data), "budget": budget}


def ready(cell: Cell, entries: list[dict[str, Any]]) -> bool | None:
    """A training needs the plan, and is needless if the plan has left its mixer out."""
    if cell["part"] == "plan":
        return True
    plan = _plan(cell, entries)
    return False if plan is None else True if cell["mixer"] in plan["step seconds"] else None


def run_until(cell: Cell, folder: Path, device: torch.device, end: float | None) -> dict[str, Any]:
    """Measure the speeds, or train a model; stop at `end` of time.monotonic() with OutOfTime."""
    _free(device)
    output = folder.parents[1]
    data = text.Corpus.load(output, f"large-{cell['size']}")
    if cell["part"] == "plan":
        return _measure(cell, data, folder, device)
    plan = _plan(cell, _plans(output))
    assert plan is not None  # `ready` has seen to it
    model = new_model(cell, cell["mixer"], data)
    found = {
        "parameters": model.num_parameters(),
        "intermediate_size": model.config.intermediate_size,
        "tokens": plan["steps"] * cell["sequences"] * cell["seq_len"],
        "processes": processes(),
        **_flops(model, cell, device),
    }
    trained = train_to_steps(
        model, data, cell, folder, steps=plan["steps"],
        save_every=max(1, round(_SAVE_SECONDS / plan["step seconds"][cell["mixer"]])), device=device, end=end,
    )  # fmt: skip
    found |= trained | {"spikes": spikes([norm for _, norm in trained["gradient norms"]])}
    found |= {"held out": None, "windows": None, "corpus": data.describe()}
    if trained["diverged"] is None:
        found |= _held_out(model, data, cell)
        if is_first():
            target = output / "large-models" / cell["size"] / cell["mixer"]
            write_checkpoint(model, data.folder / "tokenizer", target, overwrite=True)
    return found


def section(entries: list[dict[str, Any]], picture: Path) -> str:
    """Answer, table and picture of the trainings with the latest plan."""
    plan, models = latest(entries)
    draw(models, picture)
    return page_text(plan, models)


def _plans(output: Path) -> list[dict[str, Any]]:
    """The plans in the results file."""
    return [e for e in Record(output / "large.json", "large").entries if e["cell"]["part"] == "plan"]


def _plan(cell: Cell, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The result of the plan for a training."""
    same = {name: value for name, value in cell.items() if name not in ("part", "mixer")}
    found = [e["result"] for e in entries if e["cell"]["part"] == "plan" and same.items() <= e["cell"].items()]
    return found[-1] if found else None


def _free(device: torch.device) -> None:
    """Free the memory of models that are not used any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _measure(cell: Cell, data: text.Corpus, folder: Path, device: torch.device) -> dict[str, Any]:
    """Seconds of a step with each mixer, and the steps that all of them can have in the budget."""
    seconds: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for mixer in cell["mixers"]:
        try:
            seconds[mixer] = step_seconds(cell, mixer, data, folder / mixer, device)
        except Exception as error:  # packages of other layers fail in many ways, in all processes alike
            if mixer == "gka":
                raise
            left_out[mixer] = f"{type(error).__name__}: {str(error).partition(_LINE_END)[0]}"
        _free(device)
    steps = int(60 * SHARE * cell["budget"] / sum(seconds.values()))
    if steps < 1:
        raise UserError(
            f"--budget {cell['budget']:g}: too short for one step of each mixer; expected more minutes"
        )
    tokens = steps * cell["sequences"] * cell["seq_len"]
    return {
        "step seconds": seconds, "left out": left_out, "steps": steps, "tokens": tokens, "processes": processes(),
    }  # fmt: skip


def _flops(model: Any, cell: Cell, device: torch.device) -> dict[str, Any]:
    """Floating point operations for a token, and the peak of a GPU, None if it is not known."""
    kind = _PEERS.get(cell["mixer"], "Gated DeltaNet")
    flops = step_flops(model, kind, 1, cell["seq_len"], getattr(torch, cell["dtype"])) / cell["seq_len"]
    peak = peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return {"flops per token": flops, "peak flops": peak}


def _held_out(model: Any, data: text.Corpus, cell: Cell) -> dict[str, Any]:
    """The held-out loss, and nats and tokens of each window, for paired differences."""
    windows, num_bytes = text.held_out_windows(data, cell["seq_len"], cell["eval_bytes"])
    nats = token_nats(model.eval(), windows, batch_size=8, autocast=cell["dtype"] == "bfloat16")
    sums = [[round(float(row.sum(dtype=np.float64)), 3), len(row)] for row in nats]
    read = sum_nats(windows, nats, num_bytes=num_bytes, common=data.common)
    return {"held out": read.as_dict(), "windows": sums}
