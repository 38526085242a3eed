"""Write files and folders under a temporary name and rename them, so that they appear only when complete.

    NAME             the folder, always complete
    .NAME.partial    the new folder while it is written
    .NAME.old        the old folder while the new one takes its place
    .partial-NAME    a new file while it is written

If the process is killed, NAME is the old or the new folder, and complete. If it is killed between the last two
renames, there is no NAME, but both other folders are complete; the next write first restores the old folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; the file replaces `path` when the block ends without an error."""
    partial = partial_of(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file; it appears only when it is complete."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def partial_of(path: Path) -> Path:
    """The temporary path at which `whole_file` writes a file."""
    return path.with_name(".partial-" + path.name)


def begin_folder(folder: Path, *, overwrite: bool = False) -> Path:
    """Create an empty temporary folder next to `folder`; for a link, next to its target.

    Args:
        folder: the final folder.
        overwrite: whether the final folder may have content, which `end_folder` then replaces.

    Raises:
        FileExistsError: the final folder has content and overwrite is False, or it is a file.
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
    """Move the folder of `begin_folder` to its final place."""
    to_disk(partial)
    folder = folder.resolve()
    old = _beside(folder, "old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def replaced(folder: Path) -> Path | None:
    """The old folder, if a write was killed while the new folder took its place."""
    old = _beside(folder.resolve(), "old")
    return old if old.is_dir() else None


def to_disk(folder: Path) -> None:
    """Flush all files of a folder to disk, so that they survive a power failure."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or os.name == "posix":
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _beside(folder: Path, what: str) -> Path:
    return folder.parent / f".{folder.name}.{what}"
