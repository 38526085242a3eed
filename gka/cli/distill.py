"""`gka distill`: train a converted model (the student) to imitate its original (the teacher).

1. The GKA layers learn the outputs of the attention layers they replaced (matching.py); nothing else is trained.
2. All weights are fine-tuned on the text. The loss includes the divergence from the teacher's predictions:

       loss = mean_t ( -log p(token_t) + kl_weight * KL(teacher || student)_t )

In addition to the files of run_folder.py, the run folder contains: layers/ and tune/, the checkpoints of the two
stages; model/, the result; report.json and report.txt.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..hf.cache_size import cache_bytes
from ..hf.convert import attention_layers, replace_by_fresh, settings_of_layers
from ..hf.folders import write_whole
from ..training.errors import UserError
from ..training.matching import block_loss
from ..training.trainer import GKATrainer
from .commands import TUNE_FOLDER
from .convert_options import DistillOptions
from .loading import load_model
from .machine import describe_command, describe_machine, describe_versions
from .priming import Errors, Lesson, lesson_arguments, load_teacher, match_layers, new_trainer, open_lesson, say
from .quiet import quiet
from .together import together
from .train import save_model, train_to_the_end

CACHE_TOKENS = 32768


class TuneTrainer(GKATrainer):
    """A GKATrainer that adds the divergence from a teacher to the loss.

    Args:
        teacher: a frozen causal language model with the same vocabulary.
        kl_weight: weight of the divergence.
        **settings: arguments of GKATrainer.
    """

    def __init__(self, *, teacher: Any, kl_weight: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.teacher = teacher
        self.kl_weight = kl_weight

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss on the text plus, during training, the weighted divergence; both per token."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.kl_weight and model.training:
            with torch.no_grad():
                target = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits
            divergence = kl_sum(outputs.logits[:, :-1], target[:, :-1])
            if num_items_in_batch is None:
                divergence = divergence / target[:, :-1, 0].numel()
            else:  # the Trainer scales the loss on the text in the same way
                divergence = divergence / num_items_in_batch
                if self.args.average_tokens_across_devices:
                    divergence = divergence * self.accelerator.num_processes
            loss = loss + self.kl_weight * divergence
        return (loss, outputs) if return_outputs else loss


def kl_sum(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum over all positions of KL(teacher || student) for logits [..., X]."""
    log_student, log_teacher = (x.float().log_softmax(-1) for x in (student, teacher))
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)


def main(options: DistillOptions) -> None:
    """Run `gka distill`. Raises UserError for errors that the user can correct."""
    quiet()
    began = time.monotonic()
    output = Path(options.output).expanduser()
    arguments = lesson_arguments(options, output)
    student, teacher, tokenizer, layers = together(lambda: _models(options))
    lesson = open_lesson(options, output, arguments, teacher, tokenizer)
    student.to(lesson.arguments.device)
    losses = {"teacher": _loss(lesson, options, lesson.teacher, "the teacher")}
    losses["random"] = _loss(lesson, options, _random(lesson, student, layers, options.seed), "random layers")
    losses["converted"] = _loss(lesson, options, student, "the converted model")

    before, after = match_layers(lesson, options, output, {i: student.model.layers[i].gka for i in layers})
    losses["distilled"] = _loss(lesson, options, student, "the model after the first stage")
    trainer = _tune(lesson, options, output, student)
    losses["finetuned"] = _loss(lesson, options, student, "the result")
    save_model(trainer, output)
    if lesson.main_process:
        report = _report(lesson, options, student, losses, before, after)
        report["seconds_of_this_process"] = round(time.monotonic() - began, 1)
        text = as_text(report)
        write_whole(output / "report.json", json.dumps(report, indent=2) + "\n")
        write_whole(output / "report.txt", text + "\n")
        print(f"{text}\ncheckpoint  {output / 'model'}    (gka generate {output})")
    trainer.accelerator.end_training()


def _models(options: DistillOptions) -> tuple[Any, Any, Any, list[int]]:
    """Student, teacher, the teacher's tokenizer, and the replaced layers."""
    student = load_model(options.student, options.device)
    teacher, tokenizer = load_teacher(options)
    return student, teacher, tokenizer, replaced_layers(student, teacher, options)


def replaced_layers(student: Any, teacher: Any, options: DistillOptions) -> list[int]:
    """The layers that are attention in the teacher and GKA in the student.

    Raises:
        UserError: there is no such layer, or the two models do not fit together.
    """
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        mine, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if mine != theirs:
            raise UserError(
                f"{options.student} has {name} {mine}, {options.teacher} has {theirs}; "
                "--teacher must be the original of the student"
            )
    kept = set(attention_layers(student))
    layers = [index for index in attention_layers(teacher) if index not in kept]
    if not layers:
        raise UserError(f"{options.student}: replaces no attention layer of {options.teacher}")
    return layers


def recovered(losses: dict[str, float], name: str) -> float | None:
    """The share of the loss gap (random layers to teacher) that a model has closed; None without a gap."""
    gap = losses["random"] - losses["teacher"]
    return (losses["random"] - losses[name]) / gap if gap > 0 else None


def _loss(lesson: Lesson, options: DistillOptions, model: Any, what: str) -> float:
    """The loss on the held-out text, and a line before, since it takes minutes with a large model."""
    say(lesson, f"measuring  {what} on {len(lesson.validation)} sequences of {lesson.validation.seq_len} tokens")
    return block_loss(model, lesson.validation, options.batch_size)


def _random(lesson: Lesson, student: Any, layers: list[int], seed: int) -> Any:
    """The teacher with random GKA layers in place of its own, configured as in the student."""
    torch.manual_seed(seed)
    config = student.config
    settings = {name: copy.deepcopy(getattr(config, name)) for name in settings_of_layers()}
    return replace_by_fresh(lesson.teacher, layers, **settings)


def _tune(lesson: Lesson, options: DistillOptions, output: Path, student: Any) -> Any:
    """Fine-tune the student in place and return the trainer."""
    student.requires_grad_(True)
    trainer = new_trainer(
        TuneTrainer,
        student,
        lesson,
        options,
        output / TUNE_FOLDER,
        max(options.tune_steps, 1),
        options.learning_rate,
        teacher=lesson.teacher,
        kl_weight=options.kl_weight,
    )
    if options.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if options.tune_steps:
        say(lesson, "model      fine-tuning all weights")
        train_to_the_end(trainer, output / TUNE_FOLDER)
    return trainer


# The report


def _report(
    lesson: Lesson, options: DistillOptions, student: Any, losses: dict[str, float], before: Errors, after: Errors
) -> dict[str, Any]:
    return {
        "teacher": options.teacher,
        "student": options.student,
        "layers": list(before),
        "matching": {index: {"before": before[index], "after": after[index]} for index in before},
        "loss": {
            name: {"nats_per_token": loss, "bits_per_byte": lesson.bits_per_byte(loss)}
            for name, loss in losses.items()
        },
        "recovered": {name: recovered(losses, name) for name in ("converted", "distilled", "finetuned")},
        "measured_on": {"sequences": len(lesson.validation), "tokens_each": lesson.validation.seq_len},
        "cache": {
            "tokens": CACHE_TOKENS,
            "dtype": str(student.dtype).removeprefix("torch."),
            "teacher_bytes": cache_bytes(lesson.teacher, CACHE_TOKENS),
            "student_bytes": cache_bytes(student, CACHE_TOKENS),
        },
        "command": describe_command(),
        "options": dataclasses.asdict(options),
        "machine": describe_machine(),
        "versions": describe_versions(),
    }


def as_text(report: dict[str, Any]) -> str:
    """The report as text."""
    matching, cache = report["matching"], report["cache"]
    lines = ["layer   MSE before    after   error / power of the attention output before    after"]
    for index, errors in matching.items():
        lines.append(
            f"{index:>5}   {errors['before']['mse']:>10.3g} {errors['after']['mse']:>8.3g}"
            f"   {errors['before']['share']:>44.1%} {errors['after']['share']:>8.1%}"
        )
    lines += ["", f"{'held-out text':<38} nats/token   bits/byte   gap recovered"]
    titles = {
        "teacher": "teacher",
        "random": "random GKA layers",
        "converted": "converted, untrained",
        "distilled": "layers distilled",
        "finetuned": "fine-tuned",
    }
    for name, title in titles.items():
        loss, share = report["loss"][name], report["recovered"].get(name)
        gap = "" if share is None else f"{share:>15.1%}"
        lines.append(f"{title:<38} {loss['nats_per_token']:>10.4f} {loss['bits_per_byte']:>11.4f} {gap}".rstrip())
    old, new = cache["teacher_bytes"], cache["student_bytes"]
    lines += [
        "",
        f"cache of {cache['tokens']:,} tokens in {cache['dtype']}: {old / 2**20:.2f} MiB before, "
        f"{new / 2**20:.2f} MiB after ({new / old:.1%})",
    ]
    return "\n".join(lines)
