"""`python -m elastic_run [--kill MODULE:NAME CALL] TORCHRUN_OPTIONS -m gka ...`: torchrun with forks as workers.

The agent is that of torchrun: it starts the processes, watches them and ends all if one ends. Only their start is
another one, without the seconds that imports take. With --kill, the process of rank 1 is killed as by `kill_at`.
"""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest import mock

import torch
from kill_at import kill_at
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import main as torchrun

import gka.cli.train  # noqa: F401  # so that the forks need not
from gka.cli.main import main


def work(target: str, call: int, arguments: list[str]) -> None:
    """In each worker."""
    torch.set_num_threads(1)
    if target and os.environ["RANK"] == "1":
        kill_at(target, call)
    sys.exit(main(arguments))


def run(arguments: list[str]) -> None:
    """The agent."""
    target, call = "", 0
    if arguments[0] == "--kill":
        _, target, number, *arguments = arguments
        call = int(number)

    def launch(config: Any, entrypoint: Any) -> Any:
        return lambda *given: elastic_launch(config, work)(target, call, list(given[given.index("gka") + 1 :]))

    with mock.patch("torch.distributed.run.elastic_launch", launch):
        torchrun(["--start_method", "fork", *arguments])


if __name__ == "__main__":
    run(sys.argv[1:])
