"""The code blocks of the pages run, in the order of the page.

The blocks of a page marked ```python share a namespace, those marked ```bash are scripts, each of whose paragraphs
runs by itself (page_commands.py says how); all run in one temporary folder, which is empty at first.
`<!-- illustrative -->` on the line before a block says that it is not run; there is no other kind of block. All
pages of the guides are read; what a script leaves running ends with its page.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from page_commands import run_command, simple_commands

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))))
NOT_RUN = "<!-- illustrative -->"
LANGUAGES = ("python", "bash")


class Block(NamedTuple):
    """A block of a page. line: number of its first line of code, from 1."""

    language: str
    line: int
    code: str


def blocks(page: str) -> list[Block]:
    """The blocks of a page's text that are to be run.

    Raises:
        ValueError: a block has no end, or is of another language.
    """
    found: list[Block] = []
    lines = page.splitlines()
    before, number = "", 0
    while number < len(lines):
        line = lines[number].strip()
        if line.startswith("```"):
            end = next((n for n in range(number + 1, len(lines)) if lines[n].strip() == "```"), None)
            if end is None:
                raise ValueError(f"line {number + 1}: a block that does not end")
            if before != NOT_RUN:
                if line[3:] not in LANGUAGES:
                    raise ValueError(
                        f"line {number + 1}: a block of {line[3:]!r}, which is not run and does not say so"
                    )
                code = textwrap.dedent("\n".join(lines[number + 1 : end])) + "\n"
                found.append(Block(line[3:], number + 2, code))
            number, line = end, ""
        before = line
        number += 1
    return found


def run_bash(code: str, folder: Path, where: str) -> list[int]:
    """Run a script in a folder, paragraph by paragraph; this Python, its commands and the package are on the path.

    Returns:
        The process groups, in which what the script has started in the background goes on. Paragraphs of
        `simple_commands` alone start nothing, and have none.
    """
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    groups, log = [], folder / ".log"
    for paragraph in re.split(r"\n\s*\n", code):
        commands = simple_commands(paragraph)
        for command in commands or []:
            status, output = run_command(command, folder)
            assert status == 0, f"{where}\n{' '.join(command)}\n{output}"
        if commands is not None:
            continue
        with log.open("w") as file:  # no pipe: what goes on in the background would keep it open
            script = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", paragraph],
                cwd=folder,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status = script.wait()
        groups.append(script.pid)
        if status:
            end(script.pid)
            raise AssertionError(f"{where}\n{paragraph}\n{log.read_text(encoding='utf-8')}")
    return groups


def end(group: int) -> None:
    """End what is left of a process group."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def blocks_of(page: str) -> list[Block]:
    return blocks((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("page", list(filter(blocks_of, PAGES)))
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    groups: list[int] = []
    try:
        for block in blocks_of(page):
            where = f"{page}:{block.line}"
            if block.language == "bash":
                groups += run_bash(block.code, tmp_path, where)
                continue
            lines_before = "\n" * (block.line - 1)  # a traceback names the page's lines
            exec(compile(lines_before + block.code, str(ROOT / page), "exec"), namespace)
    finally:
        for group in groups:
            end(group)


def test_which_blocks_are_run() -> None:
    page = (
        "a\n```python\nx = 1\n```\n\n<!-- illustrative -->\n```bash\nexit 3\n```\n"
        "- item\n  ```bash\n  true\n  ```\n<!-- illustrative -->\n```text\nno\n```\n"
    )
    assert blocks(page) == [Block("python", 3, "x = 1\n"), Block("bash", 12, "true\n")]
    with pytest.raises(ValueError, match="line 2: a block that does not end"):
        blocks("a\n```python\nx")
    with pytest.raises(ValueError, match="line 2: a block of 'sh'"):
        blocks("a\n```sh\nfalse\n```\n")


def test_a_failing_block_is_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"page\.md:7"):
        run_bash("false\ntrue\n", tmp_path, "page.md:7")
    with pytest.raises(AssertionError, match=r"page\.md:7\s+gka eval nowhere\s+.*no such checkpoint"):
        run_bash("gka eval nowhere  # a folder\n", tmp_path, "page.md:7")


def test_which_scripts_are_commands_alone() -> None:
    code = "gka train --data 'b c' \\\n    --solver-steps 8  # small\n\npython -m experiments mqar\n"
    assert simple_commands(code) == [
        ["gka", "train", "--data", "b c", "--solver-steps", "8"],
        ["experiments", "mqar"],
    ]
    for other in (
        "mkdir a\n",
        "gka serve a &\n",
        "gka eval a > b\n",
        "gka eval $A\n",
        "gka eval a; false\n",
        "python -m gka\n",
    ):
        assert simple_commands(other) is None


def test_what_a_script_leaves_running_is_ended(tmp_path: Path) -> None:
    (group,) = run_bash("sleep 100 &\n", tmp_path, "page")
    os.killpg(group, 0)
    end(group)
    end(group)  # nothing is left, which is no error
