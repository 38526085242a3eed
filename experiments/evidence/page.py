"""The page of all experiments, made from their results: FOLDER.md beside the folder, pictures in it.

Every section says which command made it, where and when; the text of an experiment stands in its own module.
"""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from typing import Any

from gka.training.errors import UserError

from .catalogue import EXPERIMENTS
from .record import Record

_HEAD = """# Evidence

This page compares Gated KalmaNet (GKA) with other linear layers and with softmax attention. Each section is one
experiment that anyone can repeat: its end names the command, the date, the commit and the machine. Results that go
against GKA are shown in the same way as the others.

GLA is the same layer without the solve (gated linear attention). "Seeds" are random seeds. a is the ridge ratio of
the solve.

`python -m experiments evidence page --output {folder}` makes this page from the JSON files in `{folder}/`.
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
        raise UserError(
            f"--output {folder}: holds no results; "
            f"`python -m experiments evidence NAME --output {folder}` makes some"
        )
    named = folder if folder.name else folder.resolve()  # "." has no name of its own
    page = named.with_name(named.name + ".md")
    page.write_text(
        "\n\n".join([_HEAD.format(folder=folder.as_posix()).strip(), *sections]) + "\n", encoding="utf-8"
    )
    return page


def shown(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that may stand in one table: of the full form if there are any, of the machine measured on last."""
    wanted = "full" if any(entry["cell"]["size"] == "full" for entry in entries) else "small"
    entries = [entry for entry in entries if entry["cell"]["size"] == wanted]
    last = entries[-1]["cell"].get("machine") if entries else None
    return [entry for entry in entries if entry["cell"].get("machine") == last]


def _section(record: Record, experiment: Any, picture: Path) -> str:
    entries = shown(record.entries)
    runs = [record.content["runs"][number] for number in sorted({entry["run"] for entry in entries})]
    sources = "\n".join(f"* {source}" for source in sources_of(runs))
    return (
        f"## {record.experiment}: {experiment.SUMMARY}\n\n{experiment.section(entries, picture)}\n\n"
        f"![{experiment.SUMMARY}]({picture.parent.name}/{picture.name})\n\n"
        f"Made by ([JSON]({picture.parent.name}/{record.path.name})):\n\n{sources}"
    )


def sources_of(runs: list[dict[str, Any]]) -> list[str]:
    """What made results, a text for all processes of the same command but for `--only`, machine and versions."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in runs:
        command, _ = _split(run["command"])
        machine = run["machine"]["gpu"] or run["machine"]["processor"]
        where = f"{run['date']}, commit {run['commit']}, {machine}"
        versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
        groups.setdefault((command, where, versions), []).append(run)
    found = []
    for (command, where, versions), group in groups.items():
        parts = ""
        if any(_split(run["command"])[1] for run in group):
            parts = f" in {len(group)} process{'es' * (len(group) > 1)} with parts of it (`--only`)"
        found.append(f"`{command}`{parts}, {where}, {sum(run['seconds'] for run in group):,.0f} s, {versions}")
    return found


def _split(command: str) -> tuple[str, list[str]]:
    """A command without `--only` and its values, and these."""
    kept: list[str] = []
    only: list[str] = []
    at = kept
    for word in shlex.split(command):
        at = only if word.split("=")[0] == "--only" else kept if word.startswith("--") else at
        at.append(word)
    return shlex.join(kept), only
