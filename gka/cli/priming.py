"""Shared parts of `gka distill` and `gka rank-layers`: the teacher, the texts, and the matching of layers."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainingArguments, default_data_collator, set_seed

from ..hf.convert import FAMILIES
from ..training.data import Manifest, TokenBlocks
from ..training.errors import UserError
from ..training.matching import LayerMatching, MatchTrainer, matching_errors
from ..training.trainer import GKATrainer, ProgressCallback, ScheduleCallback
from .commands import LAYERS_FOLDER
from .loading import load_checkpoint
from .run_folder import open_run_together
from .train import schedule_of, train_to_the_end, training_arguments

Errors = dict[int, dict[str, float]]


@dataclass
class Lesson:
    """A teacher and the texts for it.

    arguments: arguments of the Trainer. batch: sequences per optimiser step, over all processes.
    """

    teacher: Any
    tokenizer: Any
    arguments: TrainingArguments
    manifest: Manifest
    train: TokenBlocks
    validation: TokenBlocks
    batch: int

    @property
    def main_process(self) -> bool:
        return self.arguments.process_index == 0

    def bits_per_byte(self, nats_per_token: float) -> float:
        return nats_per_token / math.log(2) * self.manifest.tokens_per_byte


def load_teacher(options: Any) -> tuple[Any, Any]:
    """Load the teacher of DistillOptions or RankOptions, and its tokenizer.

    Raises:
        UserError: the options do not fit together, or the teacher cannot be loaded.
    """
    if options.resume and options.overwrite:
        raise UserError("--resume and --overwrite contradict each other")
    if options.save_every % options.log_every:
        raise UserError(f"--save-every {options.save_every} must be a multiple of --log-every {options.log_every}")
    return load_checkpoint(options.teacher, options.device, families=tuple(FAMILIES))


def lesson_arguments(options: Any, output: Path) -> TrainingArguments:
    """The arguments of the Trainer for DistillOptions or RankOptions. They join the processes of torchrun."""
    return training_arguments(options, output, learning_rate=options.layer_learning_rate, eval_every=1)


def open_lesson(options: Any, output: Path, arguments: TrainingArguments, teacher: Any, tokenizer: Any) -> Lesson:
    """Create the run folder with its tokens, or open the folder of a run to resume.

    Args:
        options: DistillOptions or RankOptions.
        output: folder of the run.
        arguments: from lesson_arguments.
        teacher, tokenizer: from load_teacher.

    Raises:
        UserError: the data or the folder cannot be used.
    """
    batch = options.batch_size * options.accumulation * arguments.world_size
    manifest = open_run_together(options, output, tokenizer, batch, arguments)
    data = output / "data"
    seq_len = min(options.seq_len, manifest.validation.tokens)
    blocks = math.ceil(options.eval_bytes * manifest.tokens_per_byte / seq_len)
    return Lesson(
        teacher.to(arguments.device),
        tokenizer,
        arguments,
        manifest,
        TokenBlocks(data / "train.bin", manifest.dtype, options.seq_len, multiple=batch),
        TokenBlocks(data / "validation.bin", manifest.dtype, seq_len, max_blocks=blocks),
        batch,
    )


def match_layers(lesson: Lesson, options: Any, output: Path, layers: dict[int, Any]) -> tuple[Errors, Errors]:
    """Train GKA layers in place to match the teacher's attention outputs; resume from a checkpoint if possible.

    Args:
        lesson: teacher and texts.
        options: DistillOptions or RankOptions.
        output: folder of the run; its subfolder `layers/` has the checkpoints of this stage.
        layers: GKA layers by layer number.

    Returns:
        The held-out errors before and after, see `matching_errors`.
    """
    matching = LayerMatching(lesson.teacher, layers)
    measure = (lesson.validation, options.batch_size, lesson.arguments.device)
    before = matching_errors(matching, *measure)
    if not options.layer_steps:
        matching.close()
        return before, before
    say(lesson, f"layers     {', '.join(map(str, layers))}: training to match the teacher's attention outputs")
    folder = output / LAYERS_FOLDER
    trainer = new_trainer(
        MatchTrainer, matching, lesson, options, folder, options.layer_steps, options.layer_learning_rate
    )
    train_to_the_end(trainer, folder)
    after = matching_errors(matching, *measure)
    matching.close()
    return before, after


def new_trainer(
    cls: type[GKATrainer],
    model: Any,
    lesson: Lesson,
    options: Any,
    folder: Path,
    steps: int,
    learning_rate: float,
    **more: Any,
) -> Any:
    """The trainer of one stage; it writes checkpoints to `folder`."""
    folder.mkdir(exist_ok=True)
    eval_every = getattr(options, "eval_every", steps)
    arguments = training_arguments(options, folder, learning_rate=learning_rate, eval_every=eval_every)
    arguments.max_steps = steps
    schedule, _ = schedule_of(folder, arguments, steps, None, options.warmup)
    set_seed(options.seed)
    trainer = cls(
        schedule=schedule,
        tokens_per_byte=lesson.manifest.tokens_per_byte,
        model=model,
        args=arguments,
        train_dataset=lesson.train,
        eval_dataset=lesson.validation,
        processing_class=lesson.tokenizer,
        data_collator=default_data_collator,
        callbacks=[ScheduleCallback(schedule), ProgressCallback(schedule, lesson.batch * options.seq_len)],
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def say(lesson: Lesson, text: str) -> None:
    """Print a message on the terminal, from the main process only."""
    if lesson.main_process:
        print(text, file=sys.stderr, flush=True)
