"""`gka rank-layers`: rank attention layers by the cost of their replacement.

One GKA layer per attention layer learns to match its output; all learn at once, each on its own (matching.py).
Then each attention layer is replaced alone, and the loss on held-out text is measured. The increase of the loss is
the cost of that layer. The costs of several replaced layers do not add up; `gka distill` measures their total.

In addition to the files of run_folder.py, the run folder contains: layers/, the checkpoints; ranking.json;
ranking.txt.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from ..hf.convert import attention_layers, convert
from ..hf.folders import write_whole
from ..training.errors import UserError
from ..training.matching import block_loss
from .convert_options import RankOptions
from .machine import describe_command, describe_machine, describe_versions
from .priming import Lesson, lesson_arguments, load_teacher, match_layers, open_lesson, say
from .quiet import quiet
from .together import together


def main(options: RankOptions) -> None:
    """Run `gka rank-layers`. Raises UserError for errors that the user can correct."""
    quiet()
    output = Path(options.output).expanduser()
    arguments = lesson_arguments(options, output)
    teacher, tokenizer, layers, converted = together(lambda: _models(options))
    lesson = open_lesson(options, output, arguments, teacher, tokenizer)
    converted.to(lesson.arguments.device)
    gka_layers = {index: converted.model.layers[index].gka for index in layers}
    before, after = match_layers(lesson, options, output, gka_layers)
    loss = block_loss(lesson.teacher, lesson.validation, options.batch_size)
    costs = {}
    for index, layer in gka_layers.items():
        say(lesson, f"measuring  loss with layer {index} replaced")
        costs[index] = _loss_with(lesson, options, index, layer) - loss
    if not lesson.main_process:
        return
    order = sorted(costs, key=lambda index: costs[index])
    report = {
        "teacher": options.teacher,
        "teacher_loss": {"nats_per_token": loss, "bits_per_byte": lesson.bits_per_byte(loss)},
        "order": order,
        "layers": {
            index: {"cost_nats_per_token": costs[index], "before": before[index], "after": after[index]}
            for index in order
        },
        "measured_on": {"sequences": len(lesson.validation), "tokens_each": lesson.validation.seq_len},
        "command": describe_command(),
        "options": dataclasses.asdict(options),
        "machine": describe_machine(),
        "versions": describe_versions(),
    }
    text = as_text(report)
    write_whole(output / "ranking.json", json.dumps(report, indent=2) + "\n")
    write_whole(output / "ranking.txt", text + "\n")
    half = ",".join(map(str, sorted(order[: len(order) // 2]))) or str(order[0])
    print(f"{text}\nto replace the cheaper half: gka convert {options.teacher} --layers {half} OUT")


def _models(options: RankOptions) -> tuple[Any, Any, list[int], Any]:
    """The teacher, its tokenizer, its attention layers, and the teacher with GKA layers in place of them."""
    teacher, tokenizer = load_teacher(options)
    layers = attention_layers(teacher)
    if not layers:
        raise UserError(f"{options.teacher}: has no attention layer")
    torch.manual_seed(options.seed)
    try:
        return teacher, tokenizer, layers, convert(teacher, layers)
    except ValueError as error:
        raise UserError(f"{options.teacher}: {error}") from None


def as_text(report: dict[str, Any]) -> str:
    """The ranking as a table, the cheapest layer first."""
    lines = ["layer   loss increase (nats/token)   MSE     error / power of attention output"]
    for index in report["order"]:
        entry = report["layers"][index]
        lines.append(
            f"{index:>5}   {entry['cost_nats_per_token']:>26.4f}   {entry['after']['mse']:<7.3g} "
            f"{entry['after']['share']:.1%}"
        )
    return "\n".join(lines)


def _loss_with(lesson: Lesson, options: RankOptions, index: int, layer: Any) -> float:
    """The loss of the teacher with one layer replaced."""
    model = convert(lesson.teacher, [index])
    model.model.layers[index].gka.load_state_dict(layer.state_dict())
    return block_loss(model, lesson.validation, options.batch_size)
