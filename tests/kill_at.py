"""Run a `gka` command and kill it with SIGKILL in the middle of something.

    python -m kill_at MODULE:NAME CALL COMMAND ...

The CALL-th call of that function (counted from 1) kills the process after half of its work would
have been done: a function that writes a file leaves half a file.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

from gka.cli.main import main


def kill_at(target: str, call: int) -> None:
    """Replace the function by one that kills this process at its call-th call."""
    module_name, name = target.split(":")
    owner: Any = importlib.import_module(module_name)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), 0

    @functools.wraps(original)
    def replaced(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < call:
            return original(*arguments, **named)
        if len(arguments) > 1 and isinstance(arguments[1], (str, Path)):  # save(what, where)
            Path(arguments[1]).write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, last, replaced)


if __name__ == "__main__":
    kill_at(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
