"""The text of all installed Python packages, as a folder: code, markdown and plain text, without near copies.

    FOLDER/0/..., 1/...     files of the standard library, of site-packages etc., under their paths there
    FOLDER/.counts.json     what was kept and left out; written last

A file is left out if

    large       it has more than MOST_BYTES, which is seldom written by people
    generated   its lines have more than MEAN_LINE characters on average, or one has more than LONGEST_LINE
                (the rule of Codex, arXiv 2107.03374)
    copied      at least COPIED of the characters of its lines stand in the files before it. A line counts without
                spaces at its ends and with single spaces in it, if LEAST_LINE characters are left. So copies
                under other names, other versions of a package, licenses, and files without such lines are left
                out.

Later steps hold files out by a hash of their path (gka/training/data.py). Since near copies are gone before, no
held-out file is nearly a training file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gka.hf.folders import begin_folder, end_folder
from gka.training.data import Source, find_files

SUFFIXES = frozenset(
    ".bash .c .cc .cmake .cpp .cs .cu .cuh .cxx .f90 .go .h .hpp .java .jl .js .jsx .lua .m .md .pl .proto .py "
    ".pyi .pyx .r .rb .rs .rst .s .scala .sh .sql .swift .tcl .tex .toml .ts .tsx .txt .v".split()
)  # no data: no JSON, CSV, XML, HTML
MOST_BYTES = 1_000_000
MEAN_LINE, LONGEST_LINE = 100, 1000
LEAST_LINE = 20
COPIED = 0.8
_INDEX = ".counts.json"  # hidden files are no text of a folder


def package_folders() -> list[Path]:
    """The folders of installed packages and of the standard library, those that exist, each once."""
    paths = sysconfig.get_paths()
    named = [paths["stdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages()]
    named += [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys(Path(name).resolve() for name in named if Path(name).is_dir()))


def write_package_text(folder: Path, roots: Sequence[Path]) -> dict[str, Any]:
    """Copy the text below `roots` into `folder`, which appears only when it is complete.

    Args:
        folder: folder to write; what it contains is replaced.
        roots: folders of packages; a folder site-packages inside one is a root of its own or left out.

    Returns:
        {"files", "bytes"}: what was kept; "large", "generated", "copied": bytes that were left out.
    """
    if (folder / _INDEX).is_file():
        known: dict[str, Any] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return known
    counts = {"files": 0, "bytes": 0, "large": 0, "generated": 0, "copied": 0}
    building = begin_folder(folder, overwrite=True)
    seen = _Lines()
    try:
        for number, source in _sources(roots):
            content = source.path.read_bytes()
            reason = _left_out(content, seen)
            if reason is not None:
                counts[reason] += len(content)
                continue
            target = building / str(number) / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            counts["files"] += 1
            counts["bytes"] += len(content)
        (building / _INDEX).write_text(json.dumps(counts) + "\n", encoding="utf-8")
        end_folder(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return counts


def _sources(roots: Iterable[Path]) -> Iterator[tuple[int, Source]]:
    """The files with SUFFIXES and the number of their root, by path; the reader of the folder skips other text."""
    for number, root in enumerate(roots):
        found, _ = find_files([str(root)])
        for source in sorted(found, key=lambda source: source.name):
            if source.path.suffix.lower() in SUFFIXES:
                yield number, source


def _left_out(content: bytes, seen: _Lines) -> str | None:
    """Why a file is left out, or None."""
    if len(content) > MOST_BYTES:
        return "large"
    lines = content.splitlines()
    if not lines or len(content) > MEAN_LINE * len(lines) or max(map(len, lines)) > LONGEST_LINE:
        return "generated"
    return "copied" if seen.share(lines) >= COPIED else None


class _Lines:
    """The lines of the files that were kept."""

    def __init__(self) -> None:
        self._known: set[bytes] = set()

    def share(self, lines: Sequence[bytes]) -> float:
        """The share of known characters of lines; if it is less than COPIED, they are known from now on."""
        texts = (b" ".join(line.split()) for line in lines)
        sizes = {
            hashlib.blake2b(text, digest_size=8).digest(): len(text) for text in texts if len(text) >= LEAST_LINE
        }
        total = sum(sizes.values())
        share = sum(size for line, size in sizes.items() if line in self._known) / total if total else 1.0
        if share < COPIED:
            self._known.update(sizes)
        return share
