"""`gka` and `python -m experiments` commands of the pages, each in a process of its own (forked.py).

The commands are those of a page, word for word; what needs bash (loops, pipes, redirections) is left to it:
`simple_commands` says which is which.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from forked import run_forked


def simple_commands(code: str) -> list[list[str]] | None:
    """The module and the arguments of each line of a script, or None.

    Every line must be `gka ...` or `python -m experiments ...`, and nothing else.
    """
    commands = []
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        if not words:
            continue
        if words[:3] == ["python", "-m", "experiments"]:
            words = words[2:]
        if words[0] not in ("gka", "experiments") or any(set(word) & set("$`*?[{;&|<>~") for word in words):
            return None
        commands.append(words)
    return commands


def run_command(command: list[str], folder: Path) -> tuple[int, str]:
    """Run a module with these arguments in a folder; its exit status and what it printed."""
    done = run_forked("-m", *command, folder=folder, check=False)
    return done.returncode, done.stdout + done.stderr
