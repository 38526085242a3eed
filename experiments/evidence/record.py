"""What an experiment measured: one JSON file, whole at every moment, in which nothing is measured twice.

    {"experiment": "numerics",
     "runs":    [{"command", "commit", "date", "started", "process", "machine", "versions", "seconds"}, ...],
     "cells":   [{"cell": {...}, "run": 0, "seconds": 1.5, "result": ...}, ...]}

A cell is one measurement or training, described by a dict of numbers, strings and lists: two cells are the same if
their dicts are. Several processes may measure into one file. `run` is the place in `runs` of the process that
measured it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gka.cli.machine import describe_command, describe_commit, describe_machine, describe_versions
from gka.hf.folders import write_whole
from gka.training.errors import UserError, reason

Cell = dict[str, Any]


class Record:
    """The results file of an experiment.

    Args:
        path: the file, made with the first result.
        experiment: its name.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """

    def __init__(self, path: Path, experiment: str) -> None:
        self.path, self.experiment = path, experiment
        self.content: dict[str, Any] = {"experiment": experiment, "runs": [], "cells": []}
        if path.exists():
            self.content = self._read()
        self._start, self._started = time.perf_counter(), datetime.datetime.now(datetime.timezone.utc)
        self._process = uuid.uuid4().hex  # tells the runs of a file apart

    @property
    def entries(self) -> list[dict[str, Any]]:
        """All that was measured: cell, result, seconds, run."""
        entries: list[dict[str, Any]] = self.content["cells"]
        return entries

    def missing(self, cells: list[Cell]) -> list[Cell]:
        """Those of the cells that have no result, each once, in their order."""
        done = {_key(entry["cell"]) for entry in self.entries}
        wanted = {_key(cell): cell for cell in cells}
        return [cell for key, cell in wanted.items() if key not in done]

    def best_rate(self, same: Cell, rates: list[float], loss: Callable[[dict[str, Any]], float]) -> float:
        """The learning rate whose training lost least.

        Args:
            same: what the cells of the trainings share; "mixer" among it.
            rates: that must have been tried. loss: of an entry.

        Raises:
            UserError: one has not been tried.
        """
        found = {
            entry["cell"]["learning_rate"]: loss(entry)
            for entry in self.entries
            if "learning_rate" in entry["cell"] and same.items() <= entry["cell"].items()
        }
        if missing := [rate for rate in rates if rate not in found]:
            raise UserError(f"the learning rates {missing} have not been tried with {same['mixer']}")
        return float(min(rates, key=found.__getitem__))

    def add(self, cell: Cell, result: Any, seconds: float) -> None:
        """Write a result.

        Raises:
            ValueError: the cell has one already, or the result holds NaN or infinity, which JSON has no word for.
        """
        json.dumps(result, allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path):
            self._add(cell, result, seconds)

    def _add(self, cell: Cell, result: Any, seconds: float) -> None:
        """With what another process has written since."""
        if self.path.exists():
            self.content = self._read()
        if not self.missing([cell]):
            raise ValueError(f"{cell} is measured already")
        runs = self.content["runs"]
        number = next((n for n, run in enumerate(runs) if run["process"] == self._process), len(runs))
        if number == len(runs):
            runs.append(self._describe())
        runs[number]["seconds"] = round(time.perf_counter() - self._start, 1)
        self.entries.append({"cell": cell, "run": number, "seconds": round(seconds, 2), "result": result})
        write_whole(self.path, self._text())

    def _describe(self) -> dict[str, Any]:
        return {
            "command": describe_command(),
            "commit": describe_commit(),
            "date": datetime.date.today().isoformat(),
            "started": self._started.isoformat(timespec="seconds"),  # with seconds: what ran at the same time
            "process": self._process,
            "machine": describe_machine(),
            "versions": describe_versions(),
        }

    def _text(self) -> str:
        """A line per run and per cell, so that a difference of two files can be read."""
        parts = [f' "experiment": {json.dumps(self.experiment)}']
        for name in ("runs", "cells"):
            lines = ",\n  ".join(json.dumps(item, allow_nan=False) for item in self.content[name])
            parts.append(f' "{name}": [\n  {lines}\n ]')
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def _read(self) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            held = content["experiment"]
            for entry in content["cells"]:
                _key(entry["cell"]), entry["result"], content["runs"][entry["run"]]
        except OSError as error:
            raise UserError(f"{self.path}: {reason(error)}") from None
        except (ValueError, KeyError, TypeError, IndexError):
            raise UserError(
                f"{self.path} holds no results of evidence; move it, or choose another folder"
            ) from None
        if held != self.experiment:
            raise UserError(f"{self.path} holds results of {held!r}, not of {self.experiment!r}")
        return content


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time for a file, where the system can lock files."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with Path(tempfile.gettempdir(), f"gka-{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _key(cell: Mapping[str, Any]) -> str:
    return json.dumps(cell, sort_keys=True)
