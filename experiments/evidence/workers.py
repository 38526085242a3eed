"""Cells of an experiment in several processes: each takes the next cell that may run; one process writes results.

A cell that has to wait for others, or that others make needless, is told by the experiment's function

    ready(cell, entries) -> bool | None     True: may run; False: later; None: needless

The processes share the GPUs that CUDA_VISIBLE_DEVICES names, in turn; each process sees only its own. Every result
is in the file as soon as it is there. When the time is over, cells that still run are stopped. They run again next
time, from their checkpoint if they have written one into their folder.

Processes that share a GPU take turns on it. Threads of a process do not: each has a stream of its own, and small
kernels of several cells run at the same time. So a process may run several cells, in a thread each, of an
experiment that says SIDE_BY_SIDE. After an error in one of them the process ends; the others run again.
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
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, NamedTuple

import torch

from ..tasks.replay import alone
from .record import Cell, Record

_VISIBLE = "CUDA_VISIBLE_DEVICES"
Ready = Callable[[Cell, list[dict[str, Any]]], bool | None]


class _Worker(NamedTuple):
    """A thread of a process, and the end of its pipe that is here."""

    number: int  # of the process; decides the GPU
    process: Any
    connection: Connection


class Shared(NamedTuple):
    """What a process needs: the module of the experiment, the kind of device, the folder above those of cells."""

    module: str
    device: str
    folder: Path


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
    end = None if seconds is None else monotonic() + seconds
    pending, failed, running = list(cells), list[Cell](), dict[Connection, tuple[_Worker, Cell, float]]()
    idle, unused = list[_Worker](), list(range(processes))
    try:
        while end is None or monotonic() < end:
            while (idle or unused) and (cell := take(pending, record.entries, ready)) is not None:
                if not idle:
                    idle += _start(unused.pop(0), processes, streams, shared)
                worker = idle.pop(0)
                worker.connection.send(cell)
                running[worker.connection] = worker, cell, perf_counter()
            if not running:
                break
            left = None if end is None else max(0.0, end - monotonic())
            for connection in wait(list(running), left):
                assert isinstance(connection, Connection)
                if connection not in running:  # its process has ended because of another cell
                    continue
                worker, cell, start = running.pop(connection)
                taken = perf_counter() - start
                try:
                    result, error = connection.recv()
                except EOFError:
                    result, error = None, f"its process ended with exit code {_code(worker.process)}"
                if error is None:
                    record.add(cell, result, taken)
                    shutil.rmtree(scratch_folder(shared.folder, cell), ignore_errors=True)
                    idle.append(worker)
                else:
                    failed.append(cell)
                    worker.process.kill()  # after some CUDA errors a process cannot use its GPU any more
                    unused.append(worker.number)
                    idle = [other for other in idle if other.process is not worker.process]
                    beside = [key for key, (other, _, _) in running.items() if other.process is worker.process]
                    pending[:0] = [running.pop(key)[1] for key in beside]
                report(cell, f"{taken:.1f} s" if error is None else error)
    finally:
        for worker in [*idle, *(worker for worker, _, _ in running.values())]:
            worker.process.kill()
            worker.process.join()
    return failed


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


def _start(number: int, processes: int, streams: int, shared: Shared) -> list[_Worker]:
    """A new process; a worker for each of its threads."""
    context = _context(shared)
    pipes = [context.Pipe() for _ in range(streams)]
    process = context.Process(target=_work, args=([theirs for _, theirs in pipes], processes, shared), daemon=True)
    with _one_gpu(number, shared.device):
        process.start()
    for _, theirs in pipes:
        theirs.close()
    return [_Worker(number, process, ours) for ours, _ in pipes]


def _context(shared: Shared) -> Any:
    """New processes for a GPU; else forks of one that has imported the libraries, which is quicker.

    Imports ask whether there is a GPU, and after that CUDA refuses to work in a fork.
    """
    if shared.device != "cpu" or "forkserver" not in multiprocessing.get_all_start_methods():  # not on Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([shared.module, "gka.cli.quiet"])
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


def _code(process: Any) -> int | None:
    process.join()
    code: int | None = process.exitcode
    return code


def _work(connections: list[Connection], processes: int, shared: Shared) -> None:
    """In a process: run the cells that come, in a thread for each connection."""
    from gka.cli.quiet import quiet

    quiet()
    device = torch.device("cuda", 0) if shared.device == "cuda" else torch.device(shared.device)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // (processes * len(connections))))
    experiment: Any = importlib.import_module(shared.module)
    first, *others = connections
    for connection in others:
        threading.Thread(target=_serve, args=(connection, experiment, device, shared), daemon=True).start()
    _serve(first, experiment, device, shared)


def _serve(connection: Connection, experiment: Any, device: torch.device, shared: Shared) -> None:
    """In a thread: run the cells that come, send (result, None) or (None, error)."""
    while True:
        try:
            cell = connection.recv()
        except EOFError:  # the command has ended
            return
        answer: tuple[Any, str | None]
        try:
            answer = experiment.run(cell, scratch_folder(shared.folder, cell), device), None
        except Exception as error:  # after any error in one cell, the other cells still run
            answer = None, f"{type(error).__name__}: {error}"
        gc.collect()  # frees the memory of the cell
        if device.type == "cuda":
            with alone():
                torch.cuda.empty_cache()
        connection.send(answer)
        sys.stderr.flush()
