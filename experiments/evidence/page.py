"""The page of all experiments: write FOLDER.md next to the folder of results, and the rest into the folder.

FOLDER.md has one question, one picture, one short table and the answer of each experiment (`overview.py`).
FOLDER/NAME.md has all tables, which come from the module of the experiment, with commands, machines and dates.
"""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from typing import Any

from gka.training.errors import UserError

from .catalogue import EXPERIMENTS
from .lm_page import STYLE
from .overview import OVERVIEWS
from .record import Record

_CORRECTED = "2026-11-28"  # `docs/kernels.md`, "A wrong gradient, and how it hid"
_WRONG = "In bfloat16 it was 6% to 10% wrong at the start of a sequence."
_AFTER = {"lm": _WRONG, "long": _WRONG, "ablations": _WRONG, "cost": "It made forward + backward 8% slower."}
_WITH_GATE = {mixer: STYLE[mixer][0] for mixer in ("gka", "hybrid")}
_HEAD = """# Evidence

This page compares Gated KalmaNet (GKA) with other linear layers and with softmax attention. Each section is one
experiment that anyone can repeat: a question, a table, the answer and a picture. A page of its own has every
table, with commands, dates, commits and machines. Results against GKA are shown in the same way as results in its
favour.

Install what the experiments need with `pip install '.[train,experiments]'`. Language models read the text that
`docs/evidence/corpus.txt` describes (`--data`). Mamba-2 uses the kernels of the package `mamba-ssm` where it is
installed.

GLA (gated linear attention) is the GKA layer without the solve. "Seeds" are random seeds. The number a is the
ridge ratio: the ridge is a times the norm of the key state.

`python -m experiments evidence page --output {folder}` writes these pages from the JSON files in `{folder}/`.
"""


def write_page(folder: Path) -> Path:
    """Write the page, and one picture per experiment into the folder.

    Raises:
        UserError: the folder contains no results.
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
            f"--output {folder}: contains no results; "
            f"run `python -m experiments evidence NAME --output {folder}` first"
        )
    named = folder if folder.name else folder.resolve()  # "." has no name
    page = named.with_name(named.name + ".md")
    page.write_text(
        "\n\n".join([_HEAD.format(folder=folder.as_posix()).strip(), *sections]) + "\n", encoding="utf-8"
    )
    return page


def shown(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries for one table: full size only if there are any, and the latest machine only."""
    wanted = "full" if any(entry["cell"]["size"] == "full" for entry in entries) else "small"
    entries = [entry for entry in entries if entry["cell"]["size"] == wanted]
    last = entries[-1]["cell"].get("machine") if entries else None
    return [entry for entry in entries if entry["cell"].get("machine") == last]


def _section(record: Record, experiment: Any, picture: Path) -> str:
    entries = shown(record.entries)
    full, page = picture.with_suffix(".md"), picture.parent.with_suffix(".md").name
    runs = [record.content["runs"][number] for number in sorted({entry["run"] for entry in entries})]
    sources = "\n".join(f"* {source}" for source in sources_of(runs))
    renamed = any("gka evidence" in run["command"] for run in runs)
    details = (
        f"# {record.experiment}: {experiment.SUMMARY}",
        f"All results of one section of [the evidence page](../{page}).",
        about_age(record, entries),
        experiment.section(entries, picture),
        f"![{experiment.SUMMARY}]({picture.name})",
        f"## Commands\n\nThe results are in [{record.path.name}]({record.path.name})."
        + " `gka evidence` is `python -m experiments evidence` now." * renamed,
        sources,
    )
    full.write_text("\n\n".join(part for part in details if part) + "\n", encoding="utf-8")
    folder, size = picture.parent.name, " --size full" * (entries[0]["cell"]["size"] == "full")
    parts = (
        f"## {record.experiment}: {experiment.SUMMARY}",
        OVERVIEWS[record.experiment](entries),
        about_age(record, entries),
        f"![{experiment.SUMMARY}]({folder}/{picture.name})",
        f"[All tables, commands and machines]({folder}/{full.name}). Repeat it: "
        f"`python -m experiments evidence {record.experiment}{size}`.",
    )
    return "\n\n".join(part for part in parts if part)


def about_age(record: Record, entries: list[dict[str, Any]]) -> str:
    """A warning about results with a gradient that was corrected later."""
    if record.experiment not in _AFTER:
        return ""
    runs = record.content["runs"]
    ours = [entry for entry in entries if entry["cell"].get("mixer", "gka") in _WITH_GATE]
    old = [entry["cell"] for entry in ours if runs[entry["run"]]["date"] < _CORRECTED]
    if not old:
        return ""
    then = f"older than a correction of the gradient of GKA's forget gate ({_CORRECTED})"
    names = dict.fromkeys(
        "tokens/s of " * (cell.get("part") == "speed") + _WITH_GATE[cell.get("mixer", "gka")] for cell in old
    )
    said = (
        f"These results are {then}." if len(old) == len(ours) else f"Some results are {then}: {', '.join(names)}."
    )
    speeds = any(cell.get("part") == "speed" for cell in old)
    return f"{said} {_AFTER[record.experiment]}" + f" {_AFTER['cost']}" * speeds


def sources_of(runs: list[dict[str, Any]]) -> list[str]:
    """One line per command, machine and versions; processes that differ only in `--only` share a line."""
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
            parts = f" in {len(group)} process{'es' * (len(group) > 1)}, each for a part (`--only`)"
        found.append(f"`{command}`{parts}, {where}, {sum(run['seconds'] for run in group):,.0f} s, {versions}")
    return found


def _split(command: str) -> tuple[str, list[str]]:
    """Split a command into the part without `--only`, and `--only` with its values."""
    kept: list[str] = []
    only: list[str] = []
    at = kept
    for word in shlex.split(command):
        at = only if word.split("=")[0] == "--only" else kept if word.startswith("--") else at
        at.append(word)
    return shlex.join(kept), only
