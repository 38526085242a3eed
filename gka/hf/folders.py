"""Files and folders that appear whole: written beside their place and put there by renames.

    NAME             the folder, always whole
    .NAME.partial    the new one while it is written
    .NAME.old        the one before, while the new one takes its place
    .partial-NAME    a new file while it is written

A process that is killed leaves NAME as it was or as it shall be. Killed between the two renames of the end it
leaves no NAME, and both others whole; the next write puts the one before back first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a place to write a file at; it replaces the file at `path` when the block ends without an error."""
    partial = partial_of(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def partial_of(path: Path) -> Path:
    """Where `whole_file` writes a file."""
    return path.with_name(".partial-" + path.name)


def begin_folder(folder: Path, *, overwrite: bool = False) -> Path:
    """An empty folder to write, beside the one to be; a link's is where it leads.

    Args:
        folder: the one to be. overwrite: whether it may hold something, which `end_folder` then replaces.

    Raises:
        FileExistsError: it holds something and must not, or is a file.
    """
    folder = folder.resolve()
    if (before := replaced(folder)) is not None and not folder.exists():
        before.rename(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not overwrite)):
        raise FileExistsError(f"{folder}: is not empty")
    partial = _beside(folder, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def end_folder(partial: Path, folder: Path) -> None:
    """The folder that `begin_folder` gave takes its place."""
    to_disk(partial)
    folder = folder.resolve()
    old = _beside(folder, "old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def replaced(folder: Path) -> Path | None:
    """The folder that was here before, if a write was killed while it took its place."""
    old = _beside(folder.resolve(), "old")
    return old if old.is_dir() else None


def to_disk(folder: Path) -> None:
    """Have the operating system write all files of a folder, so that they survive a power cut too."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or os.name == "posix":
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _beside(folder: Path, what: str) -> Path:
    return folder.parent / f".{folder.name}.{what}"
