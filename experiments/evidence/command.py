"""`python -m experiments evidence NAME`: run the remaining cells of an experiment, or write the page of results.

A cell is one measurement or one training. An experiment is a module with

    SUMMARY                           one sentence
    BY_MACHINE                        True if results depend on the machine (e.g. times)
    prepare(output, size, data)       optional: create data that the cells share, e.g. text; returns fields for
                                      all cells
    cells(size) -> list[Cell]         all cells; size is "small" (seconds to a minute on a laptop) or "full"
    run(cell, folder, device) -> Any  measure one cell; the folder is for this cell only, e.g. for checkpoints
    section(entries, picture) -> str  write the section of the page as markdown, and draw the picture

and is listed in catalogue.py. Every cell has its size as a field, and the machine if BY_MACHINE is True. To resume
an interrupted run, start the same command again. If a cell fails, the other cells still run; the next start of the
command repeats the failed ones.
"""

# ruff: noqa: RUF009  (option() makes a dataclass field)
from __future__ import annotations

import gc
import hashlib
import importlib
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gka.cli import shared_options as shared
from gka.cli.options import nearest, option
from gka.cli.shared_options import Device
from gka.training.errors import UserError

from .catalogue import EXPERIMENTS

PAGE = "page"


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
        None, "run only the cells with these values, e.g. mixer=gka seed=0", metavar="KEY=VALUE"
    )
    data: list[str] | None = option(
        None, "text files or folders for the language models; default: Python's standard library", metavar="PATH"
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
    measure(options.name, options.size, folder, options.only or [], options.device, options.data)


def measure(
    name: str, size: str, folder: Path, only: list[str], device: str = "auto", data: list[str] | None = None
) -> None:
    """Run the cells of an experiment that have no result yet; write each result at once."""
    import torch

    from gka.cli.loading import choose_device
    from gka.cli.quiet import quiet

    from .record import Record

    quiet()
    experiment: Any = importlib.import_module(EXPERIMENTS[name])
    place = choose_device(device)
    cells = [cell for cell in experiment.cells(size) if all(_fits(cell, text) for text in only)]
    if not cells:
        raise UserError(f"--only {' '.join(only)}: matches no cell of {name}")
    more = {"size": size, **({"machine": _machine(place)} if experiment.BY_MACHINE else {})}
    if hasattr(experiment, "prepare"):
        more |= experiment.prepare(folder, size, data)
    elif data is not None:
        raise UserError(f"--data: {name} reads no text")
    cells = [cell | more for cell in cells]
    record = Record(folder / f"{name}.json", name)
    missing = record.missing(cells)
    print(f"{name}: {len(cells)} cells, {len(missing)} to run", file=sys.stderr)
    failed = []
    for number, cell in enumerate(missing, 1):
        what = " ".join(f"{key}={value}" for key, value in cell.items() if key not in more)
        gc.collect()  # frees the memory of the previous cell
        if place.type == "cuda":
            torch.cuda.empty_cache()
        start = time.perf_counter()
        scratch = folder / name / hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:12]
        try:
            result = experiment.run(cell, scratch, place)
        except Exception as error:  # after any error in one cell, the other cells still run
            failed.append(what)
            print(f"{number}/{len(missing)} {what}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        seconds = time.perf_counter() - start
        record.add(cell, result, seconds)
        shutil.rmtree(scratch, ignore_errors=True)
        print(f"{number}/{len(missing)} {what}: {seconds:.1f} s", file=sys.stderr)
    print(f"results: {record.path}")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(missing)} cells failed, see the messages above; the first one is {failed[0]}"
        )


def _machine(device: Any) -> str:
    """The name of the GPU or of the processor."""
    from gka.cli.machine import describe_machine

    machine = describe_machine()
    name: str = machine["gpu"] if device.type == "cuda" else machine["processor"]
    return name


def _fits(cell: dict[str, Any], text: str) -> bool:
    """Whether the cell matches a filter "key=value"."""
    key, found, value = text.partition("=")
    if not found:
        raise UserError(f"--only {text}: expected KEY=VALUE")
    return key in cell and str(cell[key]) == value
