"""Cells of an experiment in several processes: each takes the next cell that may run; one process writes results.

A cell that has to wait for others, or that others make needless, is told by the experiment's function

    ready(cell, entries) -> bool | None     True: may run; False: later; None: needless

The processes share the GPUs that CUDA_VISIBLE_DEVICES names, in turn; each process sees only its own. Every result
is in the file as soon as it is there. When the time is over, cells that still run are stopped. They run again next
time, from their checkpoint if they have written one into their folder.

Processes that share a GPU do not compute at the same time, but streams of a process do. So a process may run
several cells of an experiment that has the generator `stepwise(cell, folder, device)`
(experiments/tasks/stepwise.py). After an error the process ends, and each of its cells runs again, without others:
only then is it known which of them fails.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, NamedTuple

import torch

from ..tasks.stepwise import Training
from .record import Cell, Record

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_PAUSE = 1e-4  # seconds, while all trainings of a process wait for the GPU
Ready = Callable[[Cell, list[dict[str, Any]]], bool | None]
Answer = tuple[Any, str | None]  # (result, None) or (None, error)


class Shared(NamedTuple):
    """What a process needs: the module of the experiment, the kind of device, the folder above those of cells."""

    module: str
    device: str
    folder: Path


class _Process:
    """A process that runs one cell for each of its pipes, with the ends of the pipes that are here."""

    def __init__(self, number: int, process: Any, connections: list[Connection]) -> None:
        self.number = number  # decides the GPU
        self.process = process
        self.streams = len(connections)
        self.idle = connections


def run_in_processes(
    record: Record,
    cells: list[Cell],
    ready: Ready,
    shared: Shared,
    *,
    processes: int,
    streams: int = 1,
    seconds: float | None,
    report: Callable[[Cell, str], None],
) -> list[Cell]:
    """Run cells until all have a result or are needless, or the time is over.

    Args:
        record: gets the results.
        cells: the cells without a result, in the order in which they shall start.
        ready: as above.
        shared: what the processes need.
        processes: how many.
        streams: cells that each process runs at the same time.
        seconds: time after which cells are stopped; None for no limit.
        report: called with a cell and what became of it.

    Returns:
        The cells that failed.
    """
    return _Run(record, cells, ready, shared, processes, streams, report).until(seconds)


class _Run:
    """The cells of a call of `run_in_processes`, and the processes that run them."""

    def __init__(
        self,
        record: Record,
        cells: list[Cell],
        ready: Ready,
        shared: Shared,
        processes: int,
        streams: int,
        report: Callable[[Cell, str], None],
    ) -> None:
        self.record, self.ready, self.shared, self.report = record, ready, shared, report
        self.processes, self.streams = processes, streams
        self.pending, self.failed = list(cells), list[Cell]()
        self.suspects = list[Cell]()  # ran in a process that ended with an error
        self.running: dict[Connection, tuple[_Process, Cell, float]] = {}
        self.started, self.unused = list[_Process](), list(range(processes))

    def until(self, seconds: float | None) -> list[Cell]:
        """Run the cells for so many seconds; returns those that failed."""
        end = None if seconds is None else monotonic() + seconds
        try:
            while end is None or monotonic() < end:
                while self._send():
                    pass
                if not self.running:
                    break
                for connection in wait(list(self.running), None if end is None else max(0.0, end - monotonic())):
                    assert isinstance(connection, Connection)
                    if connection in self.running:  # else its process has ended meanwhile
                        self._receive(connection)
        finally:
            for process in list(self.started):
                self._end(process)
        return self.failed

    def _send(self) -> bool:
        """Send a cell to a process, if there are both."""
        free = [process for process in self.started if process.idle and process.streams == self.streams]
        emptiest = max(free, key=lambda each: len(each.idle), default=None)
        cell: Cell | None
        if self.suspects and self.unused:
            cell, process = self.suspects.pop(0), self._start(streams=1)
        elif emptiest is None and not self.unused:
            return False
        elif (cell := take(self.pending, self.record.entries, self.ready)) is None:
            return False
        elif emptiest is None or (len(emptiest.idle) < emptiest.streams and self.unused):
            process = self._start(self.streams)
        else:
            process = emptiest
        connection = process.idle.pop(0)
        with suppress(OSError):  # the process may have ended; `_receive` learns it
            connection.send(cell)
        self.running[connection] = process, cell, perf_counter()
        return True

    def _receive(self, connection: Connection) -> None:
        """Take an answer; after an error end its process."""
        process, cell, _ = self.running[connection]
        error = self._answer(connection)
        beside = [other for other, (its, _, _) in self.running.items() if its is process]
        if error is None:
            process.idle.append(connection)
            if process.streams < self.streams:
                self._end(process)
        elif beside:
            unfinished = [cell]
            for other in beside:
                _, other_cell, _ = self.running[other]
                if not other.poll():
                    del self.running[other]
                    unfinished.append(other_cell)
                elif self._answer(other) is not None:
                    unfinished.append(other_cell)
            self.suspects += unfinished
            print(f"  {error}; its unfinished cells start again, one at a time", file=sys.stderr)
            self._end(process)
        else:
            self.failed.append(cell)
            self.report(cell, error)
            self._end(process)  # after some CUDA errors a process cannot use its GPU any more

    def _answer(self, connection: Connection) -> str | None:
        """Read an answer and write the result down; returns the error if there is none."""
        process, cell, start = self.running.pop(connection)
        taken = perf_counter() - start
        error: str | None
        try:
            result, error = connection.recv()
        except (EOFError, OSError):
            process.process.join()
            return f"its process ended with exit code {process.process.exitcode}"
        if error is None:
            self.record.add(cell, result, taken)
            shutil.rmtree(scratch_folder(self.shared.folder, cell), ignore_errors=True)
            self.report(cell, f"{taken:.1f} s")
        return error

    def _start(self, streams: int) -> _Process:
        context, number = _context(self.shared), self.unused.pop(0)
        pipes = [context.Pipe() for _ in range(streams)]
        theirs = [end for _, end in pipes]
        process = context.Process(target=_work, args=(theirs, self.processes, self.shared), daemon=True)
        with _one_gpu(number, self.shared.device):
            process.start()
        for end in theirs:
            end.close()
        self.started.append(_Process(number, process, [end for end, _ in pipes]))
        return self.started[-1]

    def _end(self, process: _Process) -> None:
        process.process.kill()
        process.process.join()
        self.started.remove(process)
        self.unused.append(process.number)


def take(pending: list[Cell], entries: list[dict[str, Any]], ready: Ready) -> Cell | None:
    """Take the first cell that may run out of `pending`; needless cells before it leave `pending`, too."""
    for cell in list(pending):
        may_run = ready(cell, entries)
        if may_run is not False:
            pending.remove(cell)
        if may_run:
            return cell
    return None


def scratch_folder(folder: Path, cell: Cell) -> Path:
    """The folder of a cell, e.g. for checkpoints, below the folder of its experiment."""
    return folder / hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:12]


def _context(shared: Shared) -> Any:
    """New processes for a GPU; else forks of one that has imported the libraries, which is quicker.

    Imports ask whether there is a GPU, and after that CUDA refuses to work in a fork.
    """
    if shared.device != "cpu" or "forkserver" not in multiprocessing.get_all_start_methods():  # not on Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, shared.module, "gka.cli.quiet"])
    return context


@contextmanager
def _one_gpu(number: int, device: str) -> Iterator[None]:
    """Let a new process see one GPU alone, since the Trainer takes the first that it sees."""
    if device != "cuda":
        yield
        return
    before = os.environ.get(_VISIBLE)
    names = before.split(",") if before else [str(n) for n in range(torch.cuda.device_count())]
    os.environ[_VISIBLE] = names[number % len(names)]
    try:
        yield
    finally:
        del os.environ[_VISIBLE]
        if before is not None:
            os.environ[_VISIBLE] = before


def _work(connections: list[Connection], processes: int, shared: Shared) -> None:
    """In a process: answer the cells that come, one of each pipe at a time."""
    from gka.cli.quiet import quiet

    quiet()
    device = torch.device("cuda", 0) if shared.device == "cuda" else torch.device(shared.device)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // (processes * len(connections))))
    experiment: Any = importlib.import_module(shared.module)
    if hasattr(experiment, "stepwise"):
        _answer_stepwise(connections, experiment, device, shared)
    else:
        (connection,) = connections
        while (cell := _received(connection)) is not None:
            folder = scratch_folder(shared.folder, cell)
            connection.send(_tried(experiment.run, cell, folder, device))
            _free(device)


def _answer_stepwise(connections: list[Connection], experiment: Any, device: torch.device, shared: Shared) -> None:
    """Run the cells that come, a step of each in turn."""
    trainings = dict[Connection, Training]()
    while True:
        idle = [connection for connection in connections if connection not in trainings]
        answers = dict[Connection, Answer]()
        for connection in wait(idle, 0 if trainings else None):
            assert isinstance(connection, Connection)
            if (cell := _received(connection)) is None:
                return
            steps = experiment.stepwise(cell, scratch_folder(shared.folder, cell), device)
            training, error = _tried(Training, steps, device, connections.index(connection))
            if error is None:
                trainings[connection] = training
            else:
                answers[connection] = None, error
        waits = True
        for connection, training in trainings.items():
            ready, error = _tried(training.is_ready)
            if ready:
                waits = False
                ended, error = _tried(training.advance)
                if ended:
                    answers[connection] = training.result, None
            if error is not None:
                answers[connection] = None, error
        for connection, answer in answers.items():
            trainings.pop(connection, None)
            connection.send(answer)
        if answers:
            _free(device)
        elif waits:
            time.sleep(_PAUSE)


def _received(connection: Connection) -> Cell | None:
    """The next cell; None if the command has ended."""
    try:
        cell: Cell = connection.recv()
    except EOFError:
        return None
    return cell


def _tried(function: Callable[..., Any], *arguments: Any) -> Answer:
    try:
        return function(*arguments), None
    except Exception as error:  # after any error in one cell, the other cells still run
        return None, f"{type(error).__name__}: {error}"


def _free(device: torch.device) -> None:
    """Free the memory of a cell that has ended."""
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):  # after an error of the GPU, which the command knows by now
            torch.cuda.empty_cache()
