"""The page of all experiments, made from their results: FOLDER.md beside the folder, pictures in it.

Every section says which command made it, where and when; the text of an experiment stands in its own module.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..errors import UserError
from .command import EXPERIMENTS
from .record import Record

_HEAD = """# Evidence

What the layer is worth beside others, measured by commands that anyone can run; results that go against it stand
here like any other. Made by `gka evidence page --output {folder}` from the JSON files in `{folder}/`.
"""


def write_page(folder: Path) -> Path:
    """Write the page; its pictures stand in the folder, under the experiments' names.

    Raises:
        UserError: the folder holds no results.
    """
    sections = []
    for name, module in EXPERIMENTS.items():
        path = folder / f"{name}.json"
        if path.exists():
            sections.append(
                _section(Record(path, name), importlib.import_module(module), path.with_suffix(".png"))
            )
    if not sections:
        raise UserError(f"--output {folder}: holds no results; `gka evidence NAME --output {folder}` makes some")
    page = folder.with_name(folder.name + ".md")
    page.write_text(
        "\n\n".join([_HEAD.format(folder=folder.as_posix()).strip(), *sections]) + "\n", encoding="utf-8"
    )
    return page


def _section(record: Record, experiment: Any, picture: Path) -> str:
    runs = record.content["runs"]
    sources = "\n".join(
        f"* `{run['command']}`, {run['date']}, commit {run['commit']}, "
        f"{run['machine']['gpu'] or run['machine']['processor']}, {run['seconds']:.0f} s, "
        + ", ".join(f"{package} {version}" for package, version in run["versions"].items())
        for run in runs
    )
    return (
        f"## {record.experiment}: {experiment.SUMMARY}\n\n{experiment.section(record.entries, picture)}\n\n"
        f"![{experiment.SUMMARY}]({picture.parent.name}/{picture.name})\n\n"
        f"Made by ([JSON]({picture.parent.name}/{record.path.name})):\n\n{sources}"
    )
