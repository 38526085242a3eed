"""Trainings of `large`: the pieces of `gka train` with a stop by the clock, and the speed of a few steps."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, default_data_collator, set_seed

from gka.cli.commands import TrainOptions
from gka.cli.train import schedule_of, training_arguments
from gka.hf import GKAForCausalLM
from gka.hf.folders import write_whole
from gka.training.data import TokenBlocks
from gka.training.errors import UserError
from gka.training.trainer import GKATrainer, ProgressCallback, ScheduleCallback

from .corpus import Corpus
from .record import Cell
from .skeleton import skeleton
from .together import OutOfTime, agreed, processes
from .training import StepClock, logged, step_of_divergence

MODEL_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
SPEED_STEPS = 12
_FIRST = 4  # steps that compile kernels and fill memory, not counted in a speed
_MOST_ROWS = 8  # sequences per process and batch
_EVALUATED = 64  # blocks of held-out tokens during the training
_STARTS = "starts.json"


def new_model(cell: Cell, mixer: str, corpus: Corpus) -> GKAForCausalLM:
    """The model with a mixer and its initial weights; all models have the same number of parameters within 2%."""
    end = corpus.tokenizer.eos_token_id
    set_seed(cell["seed"])
    config = skeleton(
        mixer,
        vocab_size=len(corpus.tokenizer),
        max_position_embeddings=cell["seq_len"],
        eos_token_id=end,
        bos_token_id=end,
        **{name: cell[name] for name in MODEL_FIELDS},
    )
    model = GKAForCausalLM(config)
    model.set_loss_chunk(cell["loss_chunk"])
    return model


def split_batch(sequences: int, number: int) -> tuple[int, int]:
    """Sequences per batch and batches per step for each of `number` processes.

    Raises:
        UserError: the sequences of a step do not divide by the processes.
    """
    if sequences % number:
        raise UserError(
            f"torchrun started {number} processes; expected a divisor of {sequences} sequences per step"
        )
    each = sequences // number
    rows = next(rows for rows in range(min(each, _MOST_ROWS), 0, -1) if each % rows == 0)
    return rows, each // rows


class Stop(TrainerCallback):
    """Ends a training with a checkpoint when the time is over; all processes agree on the step.

    Args:
        end: value of time.monotonic(); None for no limit.
        every: steps between two looks at the clock, which wait for the other processes.
    """

    def __init__(self, end: float | None, every: int) -> None:
        self.end, self.every = end, every

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.end is not None and state.global_step % self.every == 0 and agreed(monotonic() >= self.end):
            control.should_save = control.should_training_stop = True


def make_trainer(
    model: GKAForCausalLM,
    corpus: Corpus,
    cell: Cell,
    folder: Path,
    *,
    steps: int,
    save_every: int,
    device: torch.device,
    callbacks: list[TrainerCallback],
) -> GKATrainer:
    """A Trainer as `gka train` makes it, which logs loss and gradient norm of every step.

    Args:
        model, corpus, cell: as for `new_model`.
        folder: folder of the checkpoints.
        steps: optimiser steps of the whole training.
        save_every: steps between two checkpoints.
        device: device of the first process.
        callbacks: more callbacks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, accumulation = split_batch(cell["sequences"], processes())
    options = TrainOptions(
        seq_len=cell["seq_len"],
        batch_size=rows,
        accumulation=accumulation,
        learning_rate=cell["learning_rate"],
        seed=cell["seed"],
        device="cpu" if device.type == "cpu" else "auto",
        dtype=cell["dtype"],
        log_every=1,
        save_every=save_every,
    )
    arguments = training_arguments(
        options, folder, learning_rate=options.learning_rate, eval_every=max(1, steps // 10)
    )
    arguments.max_steps = steps
    schedule, _ = schedule_of(folder, arguments, steps, None, cell["warmup"])
    data, manifest, length = corpus.folder / "data", corpus.manifest, cell["seq_len"]
    eval_length = min(length, manifest.validation.tokens)
    trainer = GKATrainer(
        schedule=schedule,
        tokens_per_byte=manifest.tokens_per_byte,
        model=model,
        args=arguments,
        train_dataset=TokenBlocks(data / "train.bin", manifest.dtype, length, multiple=cell["sequences"]),
        eval_dataset=TokenBlocks(data / "validation.bin", manifest.dtype, eval_length, max_blocks=_EVALUATED),
        data_collator=default_data_collator,
        callbacks=[ScheduleCallback(schedule), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def step_seconds(cell: Cell, mixer: str, corpus: Corpus, folder: Path, device: torch.device) -> float:
    """Seconds of a training step: the median of the first process, which all processes get."""
    clock = StepClock()
    trainer = make_trainer(
        new_model(cell, mixer, corpus), corpus, cell, folder, steps=SPEED_STEPS, save_every=SPEED_STEPS,
        device=device, callbacks=[clock],
    )  # fmt: skip
    trainer.args.save_strategy = trainer.args.eval_strategy = "no"  # type: ignore[assignment]
    trainer.remove_callback(ScheduleCallback)  # it saves at the end
    trainer.schedule.start(0)
    trainer.train()
    seconds: float = agreed(statistics.median(clock.times[_FIRST:]))
    return seconds


def train_to_steps(
    model: GKAForCausalLM,
    corpus: Corpus,
    cell: Cell,
    folder: Path,
    *,
    steps: int,
    save_every: int,
    device: torch.device,
    end: float | None,
) -> dict[str, Any]:
    """Train a model in place; resume from the newest checkpoint in the folder if there is one.

    Args:
        end: value of time.monotonic() at which the training stops with a checkpoint; None for no limit.
        model, corpus, cell, folder, steps, save_every, device: as for `make_trainer`.

    Returns:
        Losses and gradient norms of all steps, held-out losses on the way, speed, memory; for the results file.

    Raises:
        OutOfTime: the time was over before the last step.
    """
    clock, per_step = StepClock(), cell["sequences"] * cell["seq_len"]
    every = 10 if cell["size"] == "full" else 1
    trainer = make_trainer(
        model, corpus, cell, folder, steps=steps, save_every=save_every, device=device,
        callbacks=[Stop(end, every), clock],
    )  # fmt: skip
    trainer.add_callback(ProgressCallback(trainer.schedule, per_step))
    starts = _begin(folder, trainer)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    diverged = step_of_divergence(trainer, folder)
    if diverged is None and trainer.state.global_step < steps:
        raise OutOfTime
    history = trainer.state.log_history
    return {
        "train loss": logged(history, "loss"),
        "gradient norms": logged(history, "grad_norm"),
        "evaluations": logged(history, "eval_loss"),
        "starts": starts,
        "seconds": round(trainer.schedule.seconds, 1),
        "tokens per second": round(per_step / statistics.median(clock.times)) if clock.times else None,
        "peak bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "diverged": diverged,
    }


def _begin(folder: Path, trainer: GKATrainer) -> list[int]:
    """The steps at which commands have started or resumed this training, with this one; kept in the folder."""
    file = folder / _STARTS
    starts: list[int] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    steps = [int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*[0-9]")]
    starts.append(max(steps, default=0))
    if trainer.is_world_process_zero():
        write_whole(file, json.dumps(starts))
    return starts
