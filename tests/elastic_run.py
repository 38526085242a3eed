"""`python -m elastic_run [--kill MODULE:NAME CALL] TORCHRUN_OPTIONS -m gka ...`: torchrun with forks as workers.

The module may be `experiments`, too.

The agent is that of torchrun: it starts the processes, watches them and ends all if one ends. Only their start is
another one, without the seconds that imports take. With --kill, the process of rank 1 is killed as by `kill_at`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from functools import partial
from typing import Any
from unittest import mock

import torch
from kill_at import kill_at
from torch.distributed.run import main as torchrun

import experiments.evidence.large  # noqa: F401  # so that the forks need not
import gka.cli.train  # noqa: F401
from experiments.__main__ import main as run_experiment
from gka.cli.main import main

POPEN = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler.Popen"


class Fork(subprocess.Popen):  # type: ignore[type-arg]
    """A process that runs `python -m gka ...` or `python -m experiments ...` in a fork of this one."""

    def __init__(self, target: str, call: int, *, args: Any, env: dict[str, str], **options: Any) -> None:
        self.kill_at, self.environment = (target, call), env
        super().__init__(args, env=env, **options)

    def _execute_child(self, args: Any, *_: Any) -> None:
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            code = 1
            try:
                module = args.index("-m") + 1
                code = self._work(args[module], list(args[module + 1 :]))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def _work(self, module: str, arguments: list[str]) -> int:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the agent has a handler of its own
        os.environ.clear()
        os.environ.update(self.environment)
        torch.set_num_threads(1)
        if self.kill_at[0] and os.environ["RANK"] == "1":
            kill_at(*self.kill_at)
        return {"gka": main, "experiments": run_experiment}[module](arguments)


def run(arguments: list[str]) -> None:
    """The agent."""
    target, call = "", 0
    if arguments[0] == "--kill":
        _, target, number, *arguments = arguments
        call = int(number)
    with mock.patch(POPEN, partial(Fork, target, call)):
        torchrun(arguments)


if __name__ == "__main__":
    run(sys.argv[1:])
