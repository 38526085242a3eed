"""`python -m experiments evidence NAME`: run the remaining cells of an experiment, or write the page of results.

A cell is one measurement or one training. An experiment is a module with

    SUMMARY                           one sentence
    BY_MACHINE                        True if results depend on the machine (e.g. times)
    prepare(output, size, data)       optional: create data that the cells share, e.g. text; returns fields for
                                      all cells
    OPTIONS                           optional: names of options of the command that `prepare` takes, too
    cells(size) -> list[Cell]         all cells; size is "small" (seconds to a minute on a laptop) or "full"
    run(cell, folder, device) -> Any  measure one cell; the folder is for this cell only, e.g. for checkpoints
    run_until(cell, folder, device, end)  in place of `run`, for trainings on several GPUs (together.py)
    section(entries, picture) -> str  all tables and the text about them as markdown; draws the picture
    ready(cell, entries)              optional: whether a cell may run now, later, or not at all (workers.py);
                                      needed for several processes
    stepwise(cell, folder, device)    optional: `run` as a generator, for several cells of a process (workers.py)

and is listed in catalogue.py. overview.py has its short section of the page. Every cell has its size as a field,
and the machine if BY_MACHINE is True. To resume an interrupted run, start the same command again. If a cell fails,
the other cells still run; the next start of the command repeats the failed ones.
"""

# ruff: noqa: RUF009  (option() makes a dataclass field)
from __future__ import annotations

import gc
import importlib
import shlex
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gka.cli import shared_options as shared
from gka.cli.options import flag, nearest, option
from gka.cli.shared_options import Device
from gka.training.errors import UserError

from .catalogue import EXPERIMENTS

PAGE = "page"
OPTIONS = ("budget", "model")  # for single experiments


@dataclass
class EvidenceOptions:
    """Options of `python -m experiments evidence`."""

    name: str | None = option(
        None,
        f"experiment to run, one of {', '.join(EXPERIMENTS)}; or {PAGE} to write the page of all results",
        positional=True,
    )
    size: Literal["small", "full"] = option(
        "small", "size of the experiment: small takes a minute on a laptop, full needs a GPU"
    )
    output: str = option("runs/evidence", "folder of the results, one JSON file per experiment", metavar="DIR")
    only: list[str] | None = option(
        None,
        "run only the cells (single trainings or measurements) with these values, e.g. mixer=gka 'seed=0|1' for "
        "either seed",
        metavar="KEY=VALUE",
    )
    data: list[str] | None = option(
        None, "text files or folders for the language models; default: Python's standard library", metavar="PATH"
    )
    processes: int | None = option(
        None,
        "processes that run cells at the same time and share the GPUs of CUDA_VISIBLE_DEVICES; default: this one",
        minimum=1,
    )
    streams: int | None = option(
        None,
        "for recall and parts: cells that each process runs at the same time, with a CUDA stream each; "
        "several processes on one GPU do not compute at the same time. After an error in one cell the others "
        "start again",
        minimum=1,
        maximum=32,  # as many as PyTorch has
    )
    minutes: float | None = option(
        None,
        "time after which no cell starts; with --processes or --streams, and in the experiment large, cells that "
        "still run are stopped",
        above=0,
    )
    budget: float | None = option(
        None,
        "for large: minutes of training of all models together, over all starts of the command; they decide the "
        "number of tokens. Default: 0.1 in the small size, 20 in the full size",
        above=0,
    )
    model: str | None = option(
        None,
        "for spectra: folder of a trained model or of a training run; default: the model of the experiment lm",
        metavar="DIR",
    )
    device: Device = shared.device("options")


def main(options: EvidenceOptions) -> None:
    """Run the command.

    Raises:
        UserError: the experiment is unknown, no cell matches the filter, or the results file cannot be used.
    """
    known = [*EXPERIMENTS, PAGE]
    if options.name not in known:
        hint = nearest(options.name or "", known) or f"; known names are {', '.join(known)}"
        raise UserError(f"unknown experiment {options.name!r}{hint}" if options.name else f"NAME is missing{hint}")
    folder = Path(options.output).expanduser()
    if options.name == PAGE:
        from .page import write_page

        print(f"written: {write_page(folder)}")
        return
    measure(
        options.name,
        options.size,
        folder,
        options.only or [],
        options.device,
        options.data,
        processes=options.processes,
        streams=options.streams,
        minutes=options.minutes,
        given={name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None},
    )


def measure(
    name: str,
    size: str,
    folder: Path,
    only: list[str],
    device: str = "auto",
    data: list[str] | None = None,
    *,
    processes: int | None = None,
    streams: int | None = None,
    minutes: float | None = None,
    given: dict[str, Any] | None = None,
) -> None:
    """Run the cells of an experiment that have no result yet; write each result at once."""
    from gka.cli.loading import choose_device
    from gka.cli.quiet import quiet

    from .record import Record

    quiet()
    start, experiment = time.monotonic(), importlib.import_module(EXPERIMENTS[name])
    place = choose_device(device)
    if streams is not None:
        if not hasattr(experiment, "stepwise"):
            raise UserError(
                f"--streams {streams}: the cells of {name} run one at a time in a process; leave it out"
            )
        processes = processes or 1
    known = experiment.cells(size)
    cells = [cell for cell in known if all(_fits(cell, text) for text in only)]
    if not cells:
        raise UserError(f"--only {' '.join(only)}: matches no cell of {name}{_what_there_is(known, only)}")
    team = _team(name, experiment, place, processes)
    first = team is None or team.first
    with nullcontext() if team is None else team.first_process_first():
        more = {"size": size} | _prepared(name, experiment, folder, size, data, given or {})
    if experiment.BY_MACHINE:
        more["machine"] = _machine(place)
    cells = [cell | more for cell in cells]
    record = Record(folder / f"{name}.json", name)
    missing = record.missing(cells)
    same = [key for key in cells[0] if len(cells) > 1 and all(cell.get(key) == cells[0][key] for cell in cells)]
    if first:
        print(f"{name}: {len(cells)} cells, {len(missing)} to run", file=sys.stderr)
        if told := [f"{key}={cells[0][key]}" for key in same if key not in more]:
            print(f"  all with {' '.join(told)}", file=sys.stderr)
    run = _Cells(name, experiment, folder, place, [*more, *same], len(missing))
    seconds = None if minutes is None else 60 * minutes
    failed: list[Any] = []
    if team is not None:
        end = None if seconds is None else start + seconds
        team.run(experiment, record, missing, folder / name, ready=run.ready, end=end, report=run.report)
        team.close()
    elif processes is None:
        failed = run.one_by_one(record, missing, seconds)
    else:
        failed = run.in_processes(record, missing, seconds, processes, streams or 1)
    if not first:
        return
    print(f"results: {record.path}")
    print(f"tables and pictures: python -m experiments evidence {PAGE} --output {shlex.quote(str(folder))}")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(missing)} cells failed, see the messages above; the first one is "
            f"{run.said(failed[0])}"
        )
    if left := len(run.open_cells(record, missing)):
        print(f"{left} cells have no result; start the same command again to run them", file=sys.stderr)


def _team(name: str, experiment: Any, device: Any, processes: int | None) -> Any:
    """The processes of torchrun, for an experiment whose cells use several GPUs; None for other experiments."""
    from .together import Team
    from .together import processes as started

    if hasattr(experiment, "run_until"):
        if processes is not None:
            raise UserError(
                f"--processes {processes}: a training of {name} uses all GPUs; start it by "
                f"torchrun --nproc_per_node {processes} -m experiments evidence {name}"
            )
        return Team(device)
    if started() > 1:
        raise UserError(f"torchrun started {started()} processes; expected one for {name}, see --processes")
    return None


def _prepared(
    name: str, experiment: Any, folder: Path, size: str, data: list[str] | None, given: dict[str, Any]
) -> dict[str, Any]:
    """The fields of all cells that `prepare` returns. UserError for an option of another experiment."""
    for option_name, value in given.items():
        if option_name not in getattr(experiment, "OPTIONS", ()):
            raise UserError(f"{flag(option_name)} {value}: {name} has no such option")
    if hasattr(experiment, "prepare"):
        fields: dict[str, Any] = experiment.prepare(folder, size, data, **given)
        return fields
    if data is not None:
        raise UserError(f"--data: {name} reads no text")
    return {}


class _Cells:
    """Runs cells of an experiment, and reports them.

    Args:
        name, experiment: of the experiment; the module.
        folder: of the results.
        device: for the cells.
        shared: fields that all cells share, which messages leave out.
        count: how many cells there are to run.
    """

    def __init__(
        self, name: str, experiment: Any, folder: Path, device: Any, shared: list[str], count: int
    ) -> None:
        self.name, self.experiment, self.folder, self.device = name, experiment, folder, device
        self.shared, self.count, self.reported = shared, count, 0

    def said(self, cell: dict[str, Any]) -> str:
        """A cell in a message."""
        return " ".join(f"{key}={value}" for key, value in cell.items() if key not in self.shared)

    def report(self, cell: dict[str, Any], outcome: str) -> None:
        """Print what became of a cell."""
        self.reported += 1
        print(f"{self.reported}/{self.count} {self.said(cell)}: {outcome}", file=sys.stderr)

    def open_cells(self, record: Any, cells: list[Any]) -> list[Any]:
        """The cells that have no result and are not needless."""
        return [cell for cell in record.missing(cells) if self.ready(cell, record.entries) is not None]

    def ready(self, cell: dict[str, Any], entries: list[Any]) -> bool | None:
        """Whether a cell may run: the experiment says it, else every cell may."""
        may_run: bool | None = getattr(self.experiment, "ready", lambda *_: True)(cell, entries)
        return may_run

    def one_by_one(self, record: Any, cells: list[Any], seconds: float | None) -> list[Any]:
        """Run the cells in this process; returns those that failed."""
        import torch

        from .workers import scratch_folder, take

        begin, pending, failed = time.monotonic(), list(cells), []
        while seconds is None or time.monotonic() - begin < seconds:
            cell = take(pending, record.entries, self.ready)
            if cell is None:
                break
            gc.collect()  # frees the memory of the previous cell
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            start, scratch = time.perf_counter(), scratch_folder(self.folder / self.name, cell)
            try:
                result = self.experiment.run(cell, scratch, self.device)
            except Exception as error:  # after any error in one cell, the other cells still run
                failed.append(cell)
                self.report(cell, f"{type(error).__name__}: {error}")
                continue
            taken = time.perf_counter() - start
            record.add(cell, result, taken)
            shutil.rmtree(scratch, ignore_errors=True)
            self.report(cell, f"{taken:.1f} s")
        return failed

    def in_processes(
        self, record: Any, cells: list[Any], seconds: float | None, processes: int, streams: int
    ) -> list[Any]:
        """Run the cells in several processes and streams; returns those that failed."""
        from .workers import Shared, run_in_processes

        if not hasattr(self.experiment, "ready"):
            raise UserError(
                f"--processes {processes}: the cells of {self.name} need each other in their order; leave it out"
            )
        shared = Shared(EXPERIMENTS[self.name], self.device.type, self.folder / self.name)
        return run_in_processes(
            record,
            cells,
            self.ready,
            shared,
            processes=processes,
            streams=streams,
            seconds=seconds,
            report=self.report,
        )


def _machine(device: Any) -> str:
    """The name of the GPU or of the processor."""
    from gka.cli.machine import describe_machine

    machine = describe_machine()
    name: str = machine["gpu"] if device.type == "cuda" else machine["processor"]
    return name


def _what_there_is(cells: list[dict[str, Any]], only: list[str]) -> str:
    """For the first filter that no cell passes: the values of its key, or the keys."""
    for text in only:
        key = text.partition("=")[0]
        values = sorted({str(cell[key]) for cell in cells if key in cell})
        if not values:
            return f"; the keys are {', '.join(sorted(set().union(*cells)))}"
        if not any(_fits(cell, text) for cell in cells):
            return f"; {key} is one of {', '.join(values)}"
    return ""


def _fits(cell: dict[str, Any], text: str) -> bool:
    """Whether the cell matches a filter "key=value", or "key=value|value" for either."""
    key, found, value = text.partition("=")
    if not found:
        raise UserError(f"--only {text}: expected KEY=VALUE")
    return key in cell and str(cell[key]) in value.split("|")
