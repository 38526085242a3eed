"""`gka` commands of the pages, each in a process of its own (forked.py).

The commands are those of a page, word for word; what needs bash (loops, pipes, redirections) is left to it:
`simple_commands` says which is which.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from forked import run_forked


def simple_commands(code: str) -> list[list[str]] | None:
    """The arguments of each line of a script in which every line is `gka ...` and nothing else, or None."""
    commands = []
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        if not words:
            continue
        if words[0] != "gka" or any(set(word) & set("$`*?[{;&|<>~") for word in words):
            return None
        commands.append(words[1:])
    return commands


def run_gka(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Run `gka` with these arguments in a folder; its exit status and what it printed."""
    done = run_forked("-m", "gka", *arguments, folder=folder, check=False)
    return done.returncode, done.stdout + done.stderr
