"""Kill a process with SIGKILL at every point where it touches a file of a folder, one point after the other.

Points are what Python announces to audit hooks: before a file is opened for writing, and once more after it was
emptied; before a rename, a removal, a new folder. Weights are written outside Python, by `safetensors` and
`torch.save`: before, and when half of the file is there. Each point gets a fork of its own and a fresh place.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WRITERS = ("transformers.modeling_utils:safe_save_file", "safetensors.torch:save_file", "torch:save")
EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


class Killer:
    """Counts points below a folder and kills this process at the chosen one."""

    def __init__(self, folder: Path, point: int) -> None:
        self.folder, self.point, self.count = str(folder), point, 0

    def arm(self) -> None:
        for writer in WRITERS:
            module, name = writer.split(":")
            owner = importlib.import_module(module)
            setattr(owner, name, self._halving(getattr(owner, name)))
        sys.addaudithook(self._hear)

    def _reached(self) -> bool:
        self.count += 1
        return self.count == self.point

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
            if not writes or not self._inside(path):
                return
            if self._reached():
                self._kill()
            if self._reached():
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
                self._kill()
        elif event in EVENTS and self._inside(_with_folder(*arguments)) and self._reached():
            self._kill()

    def _inside(self, path: Any) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(self.folder)

    def _halving(self, write: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(write)
        def halved(what: Any, where: Any, *arguments: Any, **named: Any) -> Any:
            if not isinstance(where, (str, os.PathLike)) or not self._inside(where):
                return write(what, where, *arguments, **named)
            if self._reached():
                self._kill()
            half = self._reached()
            result = write(what, where, *arguments, **named)
            if half:
                os.truncate(where, os.path.getsize(where) // 2)
                self._kill()
            return result

        return halved

    def _kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


def _with_folder(path: Any, *rest: Any) -> Any:
    """A path that an event gives relative to an open folder, its last argument, from the root on."""
    if not rest or not isinstance(rest[-1], int) or rest[-1] < 0:
        return path
    return os.path.join(os.readlink(f"/proc/self/fd/{rest[-1]}"), os.fsdecode(path))


def killed_everywhere(place: Path, begin: Callable[[Path], Any], act: Callable[[Path], Any]) -> Iterator[Path]:
    """The place after a kill at each point of `act`, until `act` comes to its end; that place is the last.

    Args:
        place: a folder that does not exist, made anew for every point by `begin`.
        begin: fills it. act: what is killed; both get the folder.
    """
    point = 0
    while True:
        point += 1
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        begin(place)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                silence()
                Killer(place, point).arm()
                act(place)
                code = 0
            except BaseException as error:
                print(repr(error), file=sys.__stderr__)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        yield place
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, "what was to be killed has failed"
            return


def silence() -> None:
    """Write nothing to the terminal from here on."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
