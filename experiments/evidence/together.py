"""Cells that all processes of torchrun run together, each with a part of every batch.

Every process runs the same cells in the same order; the first one writes the results and prints. Without torchrun
there is one process. When the time of the command is over, a training writes a checkpoint and ends with OutOfTime;
the next start of the command resumes it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .record import Cell, Record
from .workers import Ready, scratch_folder, take

_WAIT = timedelta(minutes=30)  # for the process that prepares the text


class OutOfTime(Exception):
    """A cell has stopped because the time of the command is over."""


def processes() -> int:
    """The number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes results."""
    return int(os.environ.get("RANK", "0")) == 0


def agreed(value: Any) -> Any:
    """The value of the first process, for all processes; every process must call it."""
    return value if processes() == 1 else broadcast_object_list([value])[0]


class Team:
    """The processes of this command.

    Args:
        device: "cuda" or "cpu"; each process gets a GPU of its own.
    """

    def __init__(self, device: torch.device) -> None:
        many_cpus = device.type == "cpu" and processes() > 1
        options: dict[str, Any] = {"backend": "gloo"} if many_cpus else {}
        self._state = PartialState(cpu=device.type == "cpu", timeout=_WAIT, **options)
        self.device, self.first = self._state.device, self._state.is_main_process

    @contextmanager
    def first_process_first(self) -> Iterator[None]:
        """Run the block in the first process, then in the others."""
        with self._state.main_process_first():
            yield

    def run(
        self,
        experiment: Any,
        record: Record,
        cells: list[Cell],
        folder: Path,
        *,
        ready: Ready,
        end: float | None,
        report: Callable[[Cell, str], None],
    ) -> None:
        """Run the cells. An error in a cell ends the command, since other processes might wait for this one.

        Args:
            experiment: the module; its `run_until` runs a cell.
            record: gets the results.
            cells: the cells without a result, in their order.
            folder: folder above those of the cells.
            ready: as in workers.py.
            end: value of time.monotonic() at which no cell starts and trainings stop; None for no limit.
            report: called in the first process with a cell and its outcome.
        """
        pending = list(cells)
        while not agreed(end is not None and monotonic() >= end):
            cell = take(pending, record.entries, ready)
            if cell is None:
                break
            start, scratch = perf_counter(), scratch_folder(folder, cell)
            try:
                result = experiment.run_until(cell, scratch, self.device, end)
            except OutOfTime:
                if self.first:
                    report(cell, "stopped, since the time is over; the next start of the command resumes it")
                break
            if self.first:
                record.add(cell, result, perf_counter() - start)
                shutil.rmtree(scratch, ignore_errors=True)
                report(cell, f"{perf_counter() - start:.1f} s")
            self._state.wait_for_everyone()
            record.reload()

    def close(self) -> None:
        """End the group of processes."""
        self._state.destroy_process_group()
