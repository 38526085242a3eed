"""Results of an experiment: one JSON file that is complete at every moment and has each cell once.

    {"experiment": "numerics",
     "runs":    [{"command", "commit", "date", "started", "process", "machine", "versions", "seconds"}, ...],
     "cells":   [{"cell": {...}, "run": 0, "seconds": 1.5, "result": ...}, ...]}

A cell is one measurement or training, described by a dict of numbers, strings and lists. Two cells are the same if
their dicts are equal. Several processes may write to one file. `run` is the index in `runs` of the process that
measured the cell.
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
        path: the file, created with the first result.
        experiment: name of the experiment.

    Raises:
        UserError: the file cannot be read, or contains something else.
    """

    def __init__(self, path: Path, experiment: str) -> None:
        self.path, self.experiment = path, experiment
        self.content: dict[str, Any] = {"experiment": experiment, "runs": [], "cells": []}
        if path.exists():
            self.content = self._read()
        self._start, self._started = time.perf_counter(), datetime.datetime.now(datetime.timezone.utc)
        self._process = uuid.uuid4().hex  # distinguishes the runs in a file

    @property
    def entries(self) -> list[dict[str, Any]]:
        """All measurements: cell, result, seconds, run."""
        entries: list[dict[str, Any]] = self.content["cells"]
        return entries

    def reload(self) -> None:
        """Read the file again: another process may have written to it."""
        if self.path.exists():
            self.content = self._read()

    def missing(self, cells: list[Cell]) -> list[Cell]:
        """The cells without a result, each once, in the given order."""
        done = {_key(entry["cell"]) for entry in self.entries}
        wanted = {_key(cell): cell for cell in cells}
        return [cell for key, cell in wanted.items() if key not in done]

    def best_rate(self, same: Cell, rates: list[float], loss: Callable[[dict[str, Any]], float]) -> float:
        """The learning rate of the training with the lowest loss.

        Args:
            same: the fields that the cells of the trainings share, with "mixer".
            rates: learning rates that must have been tried.
            loss: function that gives the loss of an entry.

        Raises:
            UserError: a learning rate has not been tried.
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
            ValueError: the cell already has a result, or the result contains NaN or infinity (not valid JSON).
        """
        json.dumps(result, allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path):
            self._add(cell, result, seconds)

    def _add(self, cell: Cell, result: Any, seconds: float) -> None:
        """Add a result to the file as it is now."""
        self.reload()
        if not self.missing([cell]):
            raise ValueError(f"{cell} already has a result")
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
            "started": self._started.isoformat(timespec="seconds"),  # with seconds, this shows which runs overlap
            "process": self._process,
            "machine": describe_machine(),
            "versions": describe_versions(),
        }

    def _text(self) -> str:
        """One line per run and per cell, for readable diffs."""
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
                f"{self.path} contains no results of an experiment; move it, or choose another folder"
            ) from None
        if held != self.experiment:
            raise UserError(f"{self.path} contains results of {held!r}, not of {self.experiment!r}")
        return content


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock a file for one process, if the system can lock files."""
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
