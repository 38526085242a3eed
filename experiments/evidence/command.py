"""`python -m experiments evidence NAME`: measure what is missing of an experiment, or make the page of results.

An experiment is a module with

    SUMMARY                           one sentence
    BY_MACHINE                        whether a result is one of the machine, as times are
    prepare(output, size, data)       only where cells share something, as text: make it; adds to the cells
    cells(size) -> list[Cell]         what is measured; size is "small" (seconds to a minute on a laptop) or "full"
    run(cell, folder, device) -> Any  measure one cell; the folder is its own, for checkpoints of long trainings
    section(entries, picture) -> str  markdown from what was measured; draws the picture

and is listed in catalogue.py. Cells get their size, and where it matters the machine, as parts of what they are. A
run that is cut off is gone on with by the same command; so is one of which cells failed, after all others.
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
        f"experiment to run, one of {', '.join(EXPERIMENTS)}; or {PAGE}, which writes the page of all results",
        positional=True,
    )
    size: Literal["small", "full"] = option(
        "small", "size of the experiment; small takes a minute on a laptop, full needs a GPU"
    )
    output: str = option("runs/evidence", "folder of the results, one JSON file per experiment", metavar="DIR")
    only: list[str] | None = option(
        None, "restrict the run to cells with these values, e.g. mixer=gka seed=0", metavar="KEY=VALUE"
    )
    data: list[str] | None = option(
        None, "text files or folders for the language models; default: Python's standard library", metavar="PATH"
    )
    device: Device = shared.device("options")


def main(options: EvidenceOptions) -> None:
    """Run the command.

    Raises:
        UserError: an unknown experiment, a filter that no cell fits, or a results file that cannot be used.
    """
    known = [*EXPERIMENTS, PAGE]
    if options.name not in known:
        hint = nearest(options.name or "", known) or f"; there are {', '.join(known)}"
        raise UserError(f"no experiment {options.name!r}{hint}" if options.name else f"NAME is missing{hint}")
    folder = Path(options.output).expanduser()
    if options.name == PAGE:
        from .page import write_page

        print(f"written: {write_page(folder)}")
        return
    measure(options.name, options.size, folder, options.only or [], options.device, options.data)


def measure(
    name: str, size: str, folder: Path, only: list[str], device: str = "auto", data: list[str] | None = None
) -> None:
    """Measure the cells of an experiment that have no result yet, and write each as it comes."""
    import torch

    from gka.cli.loading import choose_device
    from gka.cli.quiet import quiet

    from .record import Record

    quiet()
    experiment: Any = importlib.import_module(EXPERIMENTS[name])
    place = choose_device(device)
    cells = [cell for cell in experiment.cells(size) if all(_fits(cell, text) for text in only)]
    if not cells:
        raise UserError(f"--only {' '.join(only)}: no cell of {name} fits")
    more = {"size": size, **({"machine": _machine(place)} if experiment.BY_MACHINE else {})}
    if hasattr(experiment, "prepare"):
        more |= experiment.prepare(folder, size, data)
    elif data is not None:
        raise UserError(f"--data: {name} reads no text")
    cells = [cell | more for cell in cells]
    record = Record(folder / f"{name}.json", name)
    missing = record.missing(cells)
    print(f"{name}: {len(cells)} cells, {len(missing)} to measure", file=sys.stderr)
    failed = []
    for number, cell in enumerate(missing, 1):
        what = " ".join(f"{key}={value}" for key, value in cell.items() if key not in more)
        gc.collect()  # what the cell before held
        if place.type == "cuda":
            torch.cuda.empty_cache()
        start = time.perf_counter()
        scratch = folder / name / hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:12]
        try:
            result = experiment.run(cell, scratch, place)
        except Exception as error:  # whatever one cell meets, the others are measured
            failed.append(what)
            print(f"{number}/{len(missing)} {what}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        seconds = time.perf_counter() - start
        record.add(cell, result, seconds)
        shutil.rmtree(scratch, ignore_errors=True)
        print(f"{number}/{len(missing)} {what}: {seconds:.1f} s", file=sys.stderr)
    print(f"results: {record.path}")
    if failed:
        raise UserError(f"{len(failed)} of {len(missing)} cells failed, see above; the first: {failed[0]}")


def _machine(device: Any) -> str:
    """The name of the GPU, or of the processor."""
    from gka.cli.machine import describe_machine

    machine = describe_machine()
    name: str = machine["gpu"] if device.type == "cuda" else machine["processor"]
    return name


def _fits(cell: dict[str, Any], text: str) -> bool:
    """Whether the cell has the value of "key=value"."""
    key, found, value = text.partition("=")
    if not found:
        raise UserError(f"--only {text}: expected KEY=VALUE")
    return key in cell and str(cell[key]) == value
