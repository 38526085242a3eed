"""Training for experiments: the Trainer of `gka train`, with the measurements for a results file."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
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

SPEED = "tokens per second"  # in a result; comparable only if nothing else used the GPU
_WARMUP = 0.05  # of the steps


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Attributes:
        loss: [step, mean nats per token since the step before it in the list].
        grad_norms: [step, norm of all gradients of that step, before clipping to 1].
        seconds: wall-clock time, summed over all processes that resumed the training.
        tokens_per_second: from the median time of a step in this process; None if there was no step.
        peak_bytes: peak memory on the GPU; None on a CPU.
        diverged: the step at which the loss was not finite and the training ended; None if there was none.
        history: the log of the Trainer, with all that callbacks have added to it.
    """

    loss: list[list[float]]
    grad_norms: list[list[float]]
    seconds: float
    tokens_per_second: float | None
    peak_bytes: int | None
    diverged: int | None
    history: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """The fields as a dict for the results file."""
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
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Train a model in place; resume from the newest checkpoint in the folder if there is one.

    AdamW with betas 0.9 and 0.95 and weight decay 0.1, gradients clipped to norm 1, a warm-up and then a cosine
    schedule to 0. A checkpoint is written after each third of the steps.

    Args:
        model: a model with initial weights, float32.
        dataset: items {"input_ids": [T], "labels": [T]}, all of one length; read repeatedly if it is too short.
        folder: folder for checkpoints.
        learning_rate: peak learning rate.
        steps: optimiser steps.
        batch_size: sequences per step.
        seed: random seed of the data order.
        device: device for the training.
        dtype: "bfloat16" for autocast, or "float32".
        log_every: steps per logged loss.
        callbacks: further callbacks of the Trainer.
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
    clock = StepClock()
    trainer = GKATrainer(
        schedule=schedule,
        tokens_per_byte=1.0,  # no evaluation during training
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=default_data_collator,
        callbacks=[ScheduleCallback(schedule), clock, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    diverged = step_of_divergence(trainer, folder)
    history = trainer.state.log_history
    tokens = batch_size * len(dataset[0]["input_ids"])
    return Trained(
        loss=logged(history, "loss"),
        grad_norms=logged(history, "grad_norm"),
        seconds=round(schedule.seconds, 1),
        tokens_per_second=round(tokens / statistics.median(clock.times)) if clock.times else None,
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else None,
        diverged=diverged,
        history=history,
    )


def step_of_divergence(trainer: GKATrainer, folder: Path) -> int | None:
    """Train to the end; the step at which the loss was not finite, None if it always was."""
    try:
        train_to_the_end(trainer, folder)
    except Diverged as error:
        return error.step
    return None


def logged(history: list[dict[str, Any]], name: str) -> list[list[float]]:
    """[step, value] of all entries of a Trainer's log that have the value, rounded for a results file."""
    return [[entry["step"], round(float(entry[name]), 5)] for entry in history if name in entry]


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
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Trained, RecallLoss | None]:
    """Train a model on the text of a corpus, then measure the held-out loss with windows of the same length.

    Args:
        cell: the cell; its seq_len, tokens, batch_size, seed and dtype set up the training.
        eval_bytes: bytes of held-out text; None skips the evaluation.
        model, folder, learning_rate, device, log_every, callbacks: as for `train`.

    Returns:
        The result of the training, and the held-out loss; the loss is None if the training diverged or
        eval_bytes is None.
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
        callbacks=callbacks,
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
    """The number of optimiser steps for the tokens of a cell."""
    steps: int = cell["tokens"] // (cell["seq_len"] * cell["batch_size"])
    return steps


class StepClock(TrainerCallback):
    """Seconds from the end of a step to the end of the next: the full cost of a step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._last: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.times.append(now - self._last)
        self._last = now
