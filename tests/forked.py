"""`python -m MODULE ...` and `python -c CODE ...` in processes forked from one that has imported the libraries.

Importing them takes some seconds, a command on a small model less than one. What a process does is its own: it can
be killed, and nothing of it comes back but its exit status, what it printed and the files that it wrote. Each has
one thread, and Triton's compiler in place of its interpreter.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

PRELOADED = [
    "gka.cli.train",
    "gka.cli.distill",
    "gka.cli.rank_layers",
    "gka.cli.convert",
    "gka.cli.export",
    "matplotlib.figure",
]
Done = subprocess.CompletedProcess[str]


def _run(command: list[str], folder: str, streams: list[str], environment: dict[str, str]) -> None:
    """In the new process: the command, what it prints in two files."""
    for descriptor, name in enumerate(streams, start=1):
        with open(name, "w", encoding="utf-8") as file:
            os.dup2(file.fileno(), descriptor)
    gc.freeze()  # what is imported is no garbage
    os.chdir(folder)
    os.environ.update(environment)
    kind, what, *arguments = command
    sys.argv = [kind, *arguments]
    code: Any = 0
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def run_forked(*command: str, folder: Path | None = None, check: bool = True, timeout: float = 240) -> Done:
    """Run what Python would with these arguments, "-m" or "-c" first, in a folder or the current one."""
    return _run_all(command, folder or Path.cwd(), check, timeout, [{}])[0]


def run_ranks(*command: str, processes: int = 2, timeout: float = 240) -> Done:
    """The same in several processes that know of each other as those of torchrun do; what all have printed."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    ranks = [dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(processes)]
    done = _run_all(command, Path.cwd(), True, timeout, [{**common, **rank} for rank in ranks])
    stdout, stderr = ("".join(getattr(one, name) for one in done) for name in ("stdout", "stderr"))
    return Done(list(command), 0, stdout, stderr)


_ENVIRONMENT = threading.Lock()  # it is that of the whole process, and tests have threads


def _context() -> Any:
    """What forks, from a process that is started by the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with _ENVIRONMENT, mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        os.environ.pop("TRITON_INTERPRET", None)
        forkserver.ensure_running()
    return context


def _run_all(
    command: tuple[str, ...], folder: Path, check: bool, timeout: float, environments: list[dict[str, str]]
) -> list[Done]:
    """A process for each of the environments, side by side."""
    context, started = _context(), []
    with tempfile.TemporaryDirectory() as place:
        streams = [[f"{place}/{n}.out", f"{place}/{n}.err"] for n in range(len(environments))]
        try:
            for files, environment in zip(streams, environments, strict=True):
                process: BaseProcess = context.Process(
                    target=_run, args=(list(command), str(folder), files, environment)
                )
                process.start()
                started.append(process)
            for process in started:
                process.join(timeout)
        finally:
            for process in started:
                if process.is_alive():
                    process.kill()
                    process.join()
        printed = [[Path(name).read_text("utf-8", errors="replace") for name in files] for files in streams]
    done = [Done(list(command), p.exitcode, *texts) for p, texts in zip(started, printed, strict=True)]
    for one in done:
        assert not check or one.returncode == 0, one.stdout + one.stderr
    return done
