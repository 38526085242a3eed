"""A training of an experiment: transformers' Trainer as in `gka train`, with what a results file wants of it."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from gka.cli.train import schedule_of, train_to_the_end
from gka.training.trainer import Diverged, GKATrainer, ScheduleCallback, on_one_gpu

from ..tasks.recall_loss import RecallLoss
from .corpus import Corpus, evaluate
from .record import Cell

SPEED = "tokens per second"  # in a result; only what has the GPU for itself has one worth comparing
_WARMUP = 0.05  # of the steps


@dataclass(frozen=True)
class Trained:
    """What came of a training.

    Attributes:
        loss: [step, mean nats per token since the step before it in the list].
        grad_norms: [step, norm of all gradients of that step, before it is clipped to 1].
        seconds: of wall clock, over all processes that worked at it.
        tokens_per_second: by the median time of a step in this process; None if it made none.
        peak_bytes: greatest memory held on the GPU; None on a CPU.
        diverged: the step whose loss was not finite, at which the training ended; None if none was.
    """

    loss: list[list[float]]
    grad_norms: list[list[float]]
    seconds: float
    tokens_per_second: float | None
    peak_bytes: int | None
    diverged: int | None

    def as_dict(self) -> dict[str, Any]:
        """For a result."""
        return {
            "train loss": self.loss,
            "gradient norms": self.grad_norms,
            "seconds": self.seconds,
            SPEED: self.tokens_per_second,
            "peak bytes": self.peak_bytes,
            "diverged": self.diverged,
        }


def train(
    model: PreTrainedModel,
    dataset: Dataset[dict[str, torch.Tensor]],
    folder: Path,
    *,
    learning_rate: float,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    dtype: str = "bfloat16",
    log_every: int = 10,
) -> Trained:
    """Train a model in place, from the newest checkpoint in the folder if there is one.

    AdamW with betas 0.9 and 0.95 and weight decay 0.1, gradients clipped to norm 1, cosine schedule to 0 behind a
    warm-up; a checkpoint at every third of the steps.

    Args:
        model: with its initial weights, float32.
        dataset: items {"input_ids": [T], "labels": [T]}, all of one length; read again where they do not suffice.
        folder: for checkpoints.
        learning_rate: the peak.
        steps: of the optimiser.
        batch_size: sequences of a step.
        seed: of the order of the data.
        device: where to train.
        dtype: "bfloat16" for autocast, or "float32".
        log_every: steps of one entry of the loss.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=0.1,
        max_grad_norm=1.0,
        adam_beta2=0.95,
        seed=seed,
        data_seed=seed,
        use_cpu=device.type == "cpu",
        bf16=dtype == "bfloat16",
        logging_steps=log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=-(-steps // 3),
        save_total_limit=1,
        disable_tqdm=True,
        report_to=[],
    )
    on_one_gpu(arguments)
    schedule, _ = schedule_of(folder, arguments, steps, None, _WARMUP)
    clock = _Clock()
    trainer = GKATrainer(
        schedule=schedule,
        tokens_per_byte=1.0,  # nothing is evaluated in between
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=default_data_collator,
        callbacks=[ScheduleCallback(schedule), clock],
    )
    trainer.remove_callback(PrinterCallback)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    diverged = None
    try:
        train_to_the_end(trainer, folder)
    except Diverged as error:
        diverged = error.step
    history = trainer.state.log_history
    tokens = batch_size * len(dataset[0]["input_ids"])
    return Trained(
        loss=[[entry["step"], round(entry["loss"], 5)] for entry in history if "loss" in entry],
        grad_norms=[[e["step"], round(float(e["grad_norm"]), 5)] for e in history if "grad_norm" in e],
        seconds=round(schedule.seconds, 1),
        tokens_per_second=round(tokens / statistics.median(clock.times)) if clock.times else None,
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else None,
        diverged=diverged,
    )


def train_on_text(
    model: PreTrainedModel,
    corpus: Corpus,
    cell: Cell,
    folder: Path,
    *,
    learning_rate: float,
    eval_bytes: int | None,
    device: torch.device,
    log_every: int,
) -> tuple[Trained, RecallLoss | None]:
    """Train a model on the text of a corpus, then read what is held out of it with windows of the same length.

    Args:
        cell: its seq_len, tokens, batch_size, seed and dtype are those of the training.
        eval_bytes: of held-out text; None reads none.
        model, folder, learning_rate, device, log_every: as for `train`.

    Returns:
        what came of the training, and the held-out loss; None if it diverged or nothing was to be read.
    """
    trained = train(
        model,
        corpus.train_blocks(cell["seq_len"], cell["tokens"]),
        folder,
        learning_rate=learning_rate,
        steps=steps_of(cell),
        batch_size=cell["batch_size"],
        seed=cell["seed"],
        device=device,
        dtype=cell["dtype"],
        log_every=log_every,
    )
    if trained.diverged is not None or eval_bytes is None:
        return trained, None
    held_out = evaluate(
        model,
        corpus,
        context=cell["seq_len"],
        max_bytes=eval_bytes,
        batch_size=cell["batch_size"],
        autocast=cell["dtype"] == "bfloat16",
    )
    return trained, held_out


def steps_of(cell: Cell) -> int:
    """Optimiser steps in which a cell's tokens are read."""
    steps: int = cell["tokens"] // (cell["seq_len"] * cell["batch_size"])
    return steps


class _Clock(TrainerCallback):
    """Seconds from the end of a step to the end of the next, which holds all that a step costs."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._last: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.times.append(now - self._last)
        self._last = now
