"""Several processes that talk by gloo, for tests: started once, called many times.

A call names a function of a module that the processes can import; it gets a group of the first `size` processes.
If one process fails, the others may wait for it in vain: all are killed, and the next call starts new ones.
"""

from __future__ import annotations

import datetime
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from forked import _context

SECONDS = 60


class Ranks:
    """Up to `most` processes; `run` calls a function in some of them."""

    def __init__(self, most: int = 4) -> None:
        self.most = most
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        self.folder: Any = None

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What function(group, *arguments) returns in each of `size` processes.

        Raises:
            AssertionError: a process raised an error, with its traceback, or did not answer.
        """
        if not self.pipes:
            self._start()
        for pipe in self.pipes[:size]:
            pipe.send((size, function, arguments))
        found: dict[int, Any] = {}
        while len(found) < size:
            ready = wait([self.pipes[rank] for rank in range(size) if rank not in found], timeout=SECONDS)
            problem = "" if ready else f"no answer after {SECONDS} s"
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    problem, found[rank] = self.pipes[rank].recv()
                except EOFError:
                    problem = f"rank {rank} has ended"
                if problem:
                    break
            if problem:
                self.close()
                raise AssertionError(problem)
        return [found[rank] for rank in range(size)]

    def _start(self) -> None:
        context = _context()
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(self.most):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.most, f"{self.folder.name}/store", sys.path), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()
        if self.folder is not None:
            self.folder.cleanup()
        self.pipes, self.processes, self.folder = [], [], None


def _serve(pipe: Connection, rank: int, most: int, store: str, path: list[str]) -> None:
    """In a process: call what comes through the pipe until it closes."""
    sys.path[:] = path
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=Path(store).as_uri(),
        rank=rank,
        world_size=most,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    groups = {size: dist.new_group(list(range(size))) for size in range(1, most + 1)}
    while True:
        try:
            size, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("", function(groups[size], *arguments))
        except BaseException:
            answer = (f"rank {rank}: {traceback.format_exc()}", None)
        pipe.send(answer)
