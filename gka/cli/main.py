"""The `gka` program: find the command, parse its options, run it, and print user errors in one line.

Exit codes: 0 success, 2 an error that the user can correct, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..training.errors import UserError, reason
from .commands import COMMANDS, LAYERS_FOLDER, OPTIONS_FILE, TUNE_FOLDER, Command
from .options import build_parser, nearest, parse_options

_RESUMABLE = ("train", "distill", "rank-layers")
_IN_EXTRAS = (
    "accelerate",
    "matplotlib",
    "numpy",
    "safetensors",
    "tensorboard",
    "tokenizers",
    "transformers",
    "yaml",
)


_ABOUT = "gka: language models with Gated KalmaNet layers (linear time, constant-size state)"
_START = (
    "start here:",
    "  gka train --max-minutes 3 --output runs/first",
    "  gka generate runs/first --prompt 'def main('",
    "  gka eval runs/first",
)


def _overview(program: str, commands: Mapping[str, Command], about: str, start: Sequence[str]) -> str:
    lines = [about, "", f"usage: {program} COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<12} {command.summary}" for name, command in commands.items()]
    lines += ["", *start, ""] if start else [""]
    lines += [
        f"`{program} COMMAND --help` lists the options of a command. `{program} --version` prints the version."
    ]
    return "\n".join(lines)


def _load(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def _fail(prog: str, message: str) -> int:
    line = f"{prog}: error: {' '.join(message.split())}"
    if os.environ.get("RANK", "0") == "0":  # most often every process of torchrun has the same error
        print(line, file=sys.stderr)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun prints it, with the number of the process
        content = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(report).write_text(json.dumps(content), encoding="utf-8")
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name; default: sys.argv) and return the exit code."""
    return run(sys.argv[1:] if arguments is None else arguments, "gka", COMMANDS, _ABOUT, _START)


def run(
    arguments: Sequence[str], program: str, commands: Mapping[str, Command], about: str, start: Sequence[str] = ()
) -> int:
    """Run one command line of a program and return the exit code.

    Args:
        arguments: the command line without the name of the program.
        program: name of the program, for help and errors.
        commands: the commands of the program, by name.
        about: first line of the help.
        start: examples in the help, one line each.
    """
    arguments = list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview(program, commands, about, start))
        return 0
    if arguments[0] == "--version":
        print(f"gka {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        hint = nearest(name, list(commands)) or f"; commands are {', '.join(commands)}"
        return _fail(program, f"unknown command {name!r}{hint}")
    command, prog = commands[name], f"{program} {name}"
    options: Any = None
    began = time.time()
    try:
        options_class = _load(command.options)
        parser = build_parser(options_class, prog, command.summary, command.examples)
        options = parse_options(parser, options_class, rest)
        _load(command.run)(options)
        sys.stdout.flush()
    except UserError as error:
        return _fail(prog, str(error))
    except BrokenPipeError:  # the reader of our output, e.g. `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno is None or error.filename is None:
            raise
        return _fail(prog, f"{error.filename}: {reason(error)}")
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _IN_EXTRAS:
            raise
        extra = "serve" if name == "serve" else "train"
        return _fail(prog, f"needs {package}, which is not installed: pip install 'gated-kalmanet[{extra}]'")
    except KeyboardInterrupt:
        resumable = name in _RESUMABLE and options is not None
        print(f"\n{prog}: interrupted{_how_to_resume(prog, options, began) if resumable else ''}", file=sys.stderr)
        return 130
    return 0


def _how_to_resume(prog: str, options: Any, began: float) -> str:
    """The command that resumes an interrupted one, and where it starts.

    A folder whose options are older than this command, which is not a resumed one, holds another run.
    """
    folder = Path(options.output).expanduser()
    saved = folder / OPTIONS_FILE
    if not saved.is_file() or not (options.resume or saved.stat().st_mtime > began - 1):
        return "; nothing is saved yet"
    command = f"; `{prog} --resume --output {shlex.quote(options.output)}`"
    for stage in (TUNE_FOLDER, LAYERS_FOLDER, ""):  # the last first
        places = [place for place in (folder / stage).glob("checkpoint-*") if place.is_dir()]
        found = [re.fullmatch(r"checkpoint-(\d+)", place.name) for place in places]
        if steps := [int(match[1]) for match in found if match]:
            return f"{command} resumes from step {max(steps)}{f' of {stage}/' if stage else ''}"
    return f"{command} starts at step 0: no checkpoint yet"


if __name__ == "__main__":
    sys.exit(main())
