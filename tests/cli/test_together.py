"""An error in one of several processes ends all of them with the same line."""

from __future__ import annotations

from forked import run_ranks

SCRIPT = """
import os
from accelerate import PartialState
from gka.cli.together import together
from gka.training.errors import UserError

process = PartialState(cpu=True).process_index

def fail(errors):
    if process in errors:
        raise errors[process]
    return process

missing = FileNotFoundError(2, os.strerror(2), "a.txt")
cases = {
    "none": {},
    "first": {0: UserError("too little text")},
    "second": {1: UserError("no tokenizer"), 2: UserError("no disk")},
    "file": {0: missing, 1: UserError("a consequence")},
    "bug": {0: KeyError("train")},
}
for name, errors in cases.items():
    try:
        print(name, process, "returned", together(lambda: fail(errors)))
    except Exception as error:
        print(name, process, type(error).__name__, error)
"""


def test_all_processes_have_the_error_of_the_first_that_fails() -> None:
    lines = run_ranks("-c", SCRIPT, processes=3).stdout.splitlines()
    told = {tuple(line.split(" ", 2)[:2]): line.split(" ", 2)[2] for line in lines}
    assert len(told) == 15
    for process in "012":
        assert told["none", process] == f"returned {process}"
        assert told["first", process] == "UserError too little text"
        assert told["second", process] == "UserError process 1: no tokenizer"
        assert told["file", process] == "UserError a.txt: no such file or directory"
        bug = "KeyError 'train'" if process == "0" else "UserError KeyError: 'train'"
        assert told["bug", process] == bug, "the traceback is printed where it happened"
