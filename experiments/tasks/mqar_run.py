"""`python -m experiments mqar`: train small models with each mixer on multi-query associative recall.

A cell is one training: mixer x dim x learning rate x seed. Every mixer gets the same data, the same order of
it, the same widths and the same learning rates; of these the best is reported, mean and range over the seeds,
as in the Zoology paper. Files of the output folder, brought up to date after every cell:

    mqar.json   all cells with their settings and histories, the table, machine, versions, commands, seconds
    mqar.png    accuracy against dim and against training steps

Nothing heavy is imported before it is needed, so that `python -m experiments mqar --help` is quick.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gka.cli.options import flag, option
from gka.training.errors import UserError, reason

RESULTS_FILE, PLOT_FILE = "mqar.json", "mqar.png"
MIXERS = ("gka", "gla", "attention")
ALL_MIXERS = (*MIXERS, "gdn", "mamba2")


def _list(default: Sequence[Any], help: str, **settings: Any) -> Any:
    """Declare an option that is a list; every instance gets its own."""
    metadata = option(None, help, **settings).metadata
    return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)


_TASK, _MODEL, _TRAINING, _RUN = "task", "models", "training", "run"

# What tells the cells of one results file apart, and what may differ when a run is gone on with.
_AXES = ("mixers", "dims", "learning_rates", "seeds")
_MAY_CHANGE = frozenset({*_AXES, "device", "threads", "output", "resume", "overwrite"})


@dataclass
class MQAROptions:
    """Options of the command; the defaults are the smallest setting of the Zoology paper's comparison."""

    seq_len: int = option(64, "tokens of a sequence, even", group=_TASK, minimum=4)
    num_pairs: int = option(4, "key-value pairs of a sequence", group=_TASK, minimum=1)
    vocab_size: int = option(8192, "tokens; half are keys, half values", group=_TASK, minimum=4)
    power_a: float = option(
        0.01,
        "power law of where the queries stand: 1 is uniform, near 0 is close to the pairs",
        group=_TASK,
        above=0,
    )
    random_non_queries: bool = option(
        True, "fill what is neither pair nor query with random tokens; else with token 0", group=_TASK
    )
    train_examples: int = option(100_000, "sequences to train on", group=_TASK, minimum=1)
    test_examples: int = option(3_000, "sequences to score", group=_TASK, minimum=1)

    mixers: list[str] = _list(  # noqa: RUF009
        MIXERS,
        "what to compare: gka; gla, the same layer without the solve; attention (softmax); gdn (Gated DeltaNet); "
        "mamba2",
        group=_MODEL,
        metavar="NAME",
    )
    dims: list[int] = _list(  # noqa: RUF009
        (64, 128, 256), "widths of the residual stream", group=_MODEL, minimum=2
    )
    heads: int = option(2, "heads of a layer", group=_MODEL, minimum=1)
    head_dim: int | None = option(
        None, "dim of keys and values of a head; default: dim / heads", group=_MODEL, minimum=1
    )

    epochs: int = option(64, "passes over the training sequences", group=_TRAINING, minimum=1)
    batch_size: int = option(256, "sequences per step", group=_TRAINING, minimum=1)
    learning_rates: list[float] = _list(  # noqa: RUF009
        (1e-3, 3e-3, 1e-2),
        "peak rates to try with every mixer; the best is reported",
        group=_TRAINING,
        above=0,
    )
    warmup: float = option(
        0.05,
        "share of the steps in which the rate rises; then it falls to 0 as a cosine",
        group=_TRAINING,
        minimum=0,
        maximum=0.9,
    )
    weight_decay: float = option(
        0.1, "of matrices only: not of norms, biases, A_log, dt_bias and D", group=_TRAINING, minimum=0
    )
    adam_beta2: float = option(
        0.95,
        "of AdamW; with 0.999 the rare gradients of single tokens keep the start slow",
        group=_TRAINING,
        minimum=0,
        maximum=0.9999,
    )
    eval_every: int = option(100, "steps between two tests", group=_TRAINING, minimum=1)
    stop_accuracy: float = option(
        0.99, "end a training once the test accuracy is above this", group=_TRAINING, above=0, maximum=1
    )
    seeds: list[int] = _list(  # noqa: RUF009
        (0,), "of data and weights, one training each", group=_TRAINING, minimum=0
    )

    device: Literal["auto", "cpu"] = option("auto", "auto takes a GPU where there is one", group=_RUN)
    threads: int | None = option(None, "CPU threads; default: what PyTorch takes", group=_RUN, minimum=1)
    output: str = option("runs/mqar", "folder of the results, made if need be", group=_RUN, metavar="DIR")
    resume: bool = option(False, "keep the cells that are in the output folder, train those missing", group=_RUN)
    overwrite: bool = option(False, "delete the results that are in the output folder", group=_RUN)


@dataclass(frozen=True)
class Cell:
    """One training of the comparison."""

    mixer: str
    dim: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """For people, e.g. "gka dim 64 lr 0.01 seed 0"."""
        return f"{self.mixer} dim {self.dim} lr {self.learning_rate:g} seed {self.seed}"


def cells(options: MQAROptions) -> list[Cell]:
    """All trainings that the options ask for; a first result of every mixer comes early."""
    axes = itertools.product(options.seeds, options.dims, options.learning_rates, options.mixers)
    return [Cell(mixer, dim, rate, seed) for seed, dim, rate, mixer in axes]


def main(options: MQAROptions) -> int:
    """Run `python -m experiments mqar`: train every cell that is missing, write the results, print the table.

    Raises:
        UserError: for settings that do not fit, an output folder that cannot be used, or a training
            whose loss is no longer finite.
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
            _write(folder / RESULTS_FILE, lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    _write(folder / PLOT_FILE, lambda path: plot(path, results, options))
    print(format_table(results, options))
    print(f"\nresults  {folder / RESULTS_FILE}\npicture  {folder / PLOT_FILE}")
    return 0


def check(options: MQAROptions) -> None:
    """Refuse options that cannot be run. Raises UserError naming the flag."""
    from .mqar import check_mqar
    from .mqar_train import model_config

    for name in _AXES:
        values = getattr(options, name)
        if not values:
            raise UserError(f"{flag(name)}: at least one is needed")
        if len(set(values)) < len(values):
            raise UserError(f"{flag(name)}: {', '.join(map(str, values))} names one twice")
    for mixer in options.mixers:
        if mixer not in ALL_MIXERS:
            raise UserError(f"--mixers: {mixer!r} is none of {', '.join(ALL_MIXERS)}")
    if options.resume and options.overwrite:
        raise UserError("--resume and --overwrite contradict each other")
    check_mqar(options.seq_len, options.num_pairs, options.vocab_size, options.power_a)
    for mixer, dim in itertools.product(options.mixers, options.dims):
        model_config(options, mixer, dim)


# The results file


def _open_results(options: MQAROptions, folder: Path) -> dict[str, Any]:
    """Make the folder and read what is kept of it; UserError before anything is trained or deleted."""
    file = folder / RESULTS_FILE
    kept: dict[str, Any] = {"runs": [], "table": [], "cells": []}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / (RESULTS_FILE + ".partial")).touch()
        held = file.read_text(encoding="utf-8") if file.exists() else None
    except OSError as error:
        raise UserError(f"--output {folder}: cannot write there: {reason(error)}") from None
    (folder / (RESULTS_FILE + ".partial")).unlink()
    if held is None or options.overwrite:
        return kept
    if not options.resume:
        raise UserError(
            f"--output {folder}: holds results already; --resume adds to them, --overwrite deletes them, "
            "or choose another folder"
        )
    try:
        kept = json.loads(held)
        saved = kept["runs"][0]["options"]
        for entry in kept["cells"]:
            _cell_of(entry)
    except (ValueError, KeyError, TypeError, IndexError):
        raise UserError(f"--resume: {file} holds no results of mqar") from None
    for name, value in dataclasses.asdict(options).items():
        if name not in _MAY_CHANGE and saved.get(name) != value:
            raise UserError(
                f"--resume: the results in {folder} have {flag(name)} {saved.get(name)}, not {value}; "
                "leave it out, or choose another folder"
            )
    return kept


def _cell_of(entry: dict[str, Any]) -> Cell:
    return Cell(**{axis.name: entry[axis.name] for axis in dataclasses.fields(Cell)})


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, then rename it: it is whole whenever the run is killed."""
    partial = path.with_name("partial-" + path.name)
    write(partial)
    partial.replace(path)


class _Progress:
    """A bar over the steps of all trainings, and a line when one is done.

    Args:
        trainings: how many there are.
        steps: of a training that does not stop early.
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
        """A training is at `step`; `accuracy` is that of its last test."""
        self.bar.n = self.ended * self.steps + step
        self.bar.set_postfix_str("" if accuracy is None else f"accuracy {accuracy:.3f}", refresh=False)
        self.bar.update(0)

    def end(self, entry: dict[str, Any]) -> None:
        """A training is done."""
        self.ended += 1
        self.bar.n = self.ended * self.steps
        self.bar.write(
            f"{self.ended}/{self.trainings} {_cell_of(entry).name}: accuracy {entry['accuracy']:.3f} after "
            f"{entry['steps']} steps, {entry['seconds']:.0f} s",
            file=sys.stderr,
        )
