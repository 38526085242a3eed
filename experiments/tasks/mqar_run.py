"""`python -m experiments mqar`: train small models with each mixer on multi-query associative recall.

A cell is one training: mixer x dim x learning rate x seed. Every mixer gets the same data in the same order, the
same widths and the same learning rates. As in the Zoology paper, the report has the best learning rate, with mean
and range over the seeds. The output folder has two files, which are updated after every cell:

    mqar.json   all cells with their settings and histories, the table, machine, versions, commands, seconds
    mqar.png    accuracy against dim and against training steps

Large packages are imported only when they are needed, so that `python -m experiments mqar --help` is fast.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

from gka.cli.options import flag
from gka.hf.folders import partial_of, whole_file, write_whole
from gka.training.errors import UserError, reason

from .mqar_options import ALL_MIXERS, Cell, MQAROptions, cells

RESULTS_FILE, PLOT_FILE = "mqar.json", "mqar.png"

# The options that distinguish the cells of a results file, and the options that may change on resume.
_AXES = ("mixers", "dims", "learning_rates", "seeds")
_MAY_CHANGE = frozenset({*_AXES, "device", "threads", "output", "resume", "overwrite"})


def main(options: MQAROptions) -> int:
    """Run `python -m experiments mqar`: train the remaining cells, write the results, print the table.

    Raises:
        UserError: the options do not fit together, the output folder cannot be used, or the loss of a
            training is not finite.
    """
    check(options)
    folder = Path(options.output).expanduser()
    results = _open_results(options, folder)

    import torch

    from gka.cli.machine import describe_command, describe_machine, describe_versions
    from gka.cli.quiet import quiet

    from .mqar_report import format_table, plot, summarise
    from .mqar_train import steps_of, train_cell

    quiet()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    run = {
        "command": describe_command(),
        "options": dataclasses.asdict(options),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "seconds": 0.0,
        "cpu_seconds": 0.0,
    }
    done = {_cell_of(entry) for entry in results["cells"]}
    todo = [cell for cell in cells(options) if cell not in done]
    if todo:
        results["runs"].append(run)
    wall, cpu = time.perf_counter(), time.process_time()
    with _Progress(len(todo), steps_of(options)) as progress:
        for cell in todo:
            progress.begin(cell.name)
            entry = train_cell(options, cell, progress.step)
            progress.end(entry)
            results["cells"].append({"run": len(results["runs"]) - 1, **entry})
            run["seconds"] = round(time.perf_counter() - wall, 1)
            run["cpu_seconds"] = round(time.process_time() - cpu, 1)
            results["table"] = summarise(results["cells"])
            write_whole(folder / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
    with whole_file(folder / PLOT_FILE) as partial:
        plot(partial, results, options)
    print(format_table(results, options))
    print(f"\nresults  {folder / RESULTS_FILE}\npicture  {folder / PLOT_FILE}")
    return 0


def check(options: MQAROptions) -> None:
    """Raise UserError if an option is invalid; the message names the flag."""
    from .mqar import check_mqar
    from .mqar_train import model_config

    for name in _AXES:
        values = getattr(options, name)
        if not values:
            raise UserError(f"{flag(name)}: at least one is needed")
        if len(set(values)) < len(values):
            raise UserError(f"{flag(name)}: {', '.join(map(str, values))} contains a value twice")
    for mixer in options.mixers:
        if mixer not in ALL_MIXERS:
            raise UserError(f"--mixers: {mixer!r} is not one of {', '.join(ALL_MIXERS)}")
    if options.resume and options.overwrite:
        raise UserError("--resume and --overwrite contradict each other")
    check_mqar(options.seq_len, options.num_pairs, options.vocab_size, options.power_a)
    for mixer, dim in itertools.product(options.mixers, options.dims):
        model_config(options, mixer, dim)


# The results file


def _open_results(options: MQAROptions, folder: Path) -> dict[str, Any]:
    """Create the folder and read its results. Raises UserError before any training or deletion."""
    file = folder / RESULTS_FILE
    kept: dict[str, Any] = {"runs": [], "table": [], "cells": []}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial_of(file).touch()
        held = file.read_text(encoding="utf-8") if file.exists() else None
    except OSError as error:
        raise UserError(f"--output {folder}: cannot write there: {reason(error)}") from None
    partial_of(file).unlink()
    if held is None or options.overwrite:
        return kept
    if not options.resume:
        raise UserError(
            f"--output {folder}: already contains results; --resume adds to them, --overwrite deletes them, "
            "or choose another folder"
        )
    try:
        kept = json.loads(held)
        saved = kept["runs"][0]["options"]
        for entry in kept["cells"]:
            _cell_of(entry)
    except (ValueError, KeyError, TypeError, IndexError):
        raise UserError(f"--resume: {file} contains no results of mqar") from None
    for name, value in dataclasses.asdict(options).items():
        if name not in _MAY_CHANGE and saved.get(name) != value:
            raise UserError(
                f"--resume: the results in {folder} have {flag(name)} {saved.get(name)}, not {value}; "
                "leave out the flag, or choose another folder"
            )
    return kept


def _cell_of(entry: dict[str, Any]) -> Cell:
    return Cell(**{axis.name: entry[axis.name] for axis in dataclasses.fields(Cell)})


class _Progress:
    """A progress bar over the steps of all trainings, and one line for each finished training.

    Args:
        trainings: number of trainings.
        steps: steps of a training without an early stop.
    """

    def __init__(self, trainings: int, steps: int) -> None:
        from tqdm import tqdm

        self.trainings, self.steps, self.ended = trainings, steps, 0
        shape = "{l_bar}{bar}| {elapsed}, left at most {remaining}{postfix}"
        self.bar = tqdm(
            total=trainings * steps, bar_format=shape, disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def begin(self, name: str) -> None:
        """A training starts."""
        self.bar.set_description(f"{self.ended + 1}/{self.trainings} {name}")

    def step(self, step: int, accuracy: float | None) -> None:
        """A training is at `step`; `accuracy` is the result of its last test."""
        self.bar.n = self.ended * self.steps + step
        self.bar.set_postfix_str("" if accuracy is None else f"accuracy {accuracy:.3f}", refresh=False)
        self.bar.update(0)

    def end(self, entry: dict[str, Any]) -> None:
        """A training has ended."""
        self.ended += 1
        self.bar.n = self.ended * self.steps
        self.bar.write(
            f"{self.ended}/{self.trainings} {_cell_of(entry).name}: accuracy {entry['accuracy']:.3f} after "
            f"{entry['steps']} steps, {entry['seconds']:.0f} s",
            file=sys.stderr,
        )
