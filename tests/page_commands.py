"""`gka` commands of the pages, each in a process of its own, forked from one that has imported the libraries.

Importing them takes some seconds, a command on a small model less than one. The commands are those of a page, word
for word; what needs bash (loops, pipes, redirections) is left to it: `simple_commands` says which is which.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import sys
import traceback
from pathlib import Path

PRELOADED = [
    "gka.train",
    "gka.distill",
    "gka.rank_layers",
    "gka.convert_command",
    "gka.export",
    "matplotlib.figure",
]


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


def _run(arguments: list[str], folder: str, log: str) -> None:
    """In the new process: the command, its output in a file."""
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.argv = ["gka", *arguments]
    from gka.cli import main

    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def run_gka(arguments: list[str], folder: Path, log: Path) -> tuple[int, str]:
    """Run `gka` with these arguments in a folder; its exit status and what it printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=(arguments, str(folder), str(log)))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, log.read_text(encoding="utf-8") if log.exists() else ""
