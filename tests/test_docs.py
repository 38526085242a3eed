"""The code blocks of the pages run, in the order of the page.

The blocks of a page marked ```python share a namespace, those marked ```bash are scripts; all run in one temporary
folder, which is empty at first. `<!-- illustrative -->` on the line before a block says that it is not run; blocks
marked otherwise, ```sh or ```text, are not either. A page is added by a line in PAGES.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/tools.md")
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
        ValueError: a block has no end.
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
            if line[3:] in LANGUAGES and before != NOT_RUN:
                code = textwrap.dedent("\n".join(lines[number + 1 : end])) + "\n"
                found.append(Block(line[3:], number + 2, code))
            number, line = end, ""
        before = line
        number += 1
    return found


def run_bash(code: str, folder: Path, where: str) -> None:
    """Run a script in a folder; this Python, its commands and the package are on the path."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{where}\n{code}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    found = blocks((ROOT / page).read_text(encoding="utf-8"))
    assert found, f"{page} has no block to run"
    for block in found:
        where = f"{page}:{block.line}"
        if block.language == "bash":
            run_bash(block.code, tmp_path, where)
            continue
        lines_before = "\n" * (block.line - 1)  # a traceback names the page's lines
        exec(compile(lines_before + block.code, str(ROOT / page), "exec"), namespace)


def test_which_blocks_are_run() -> None:
    page = (
        "a\n```python\nx = 1\n```\n\n<!-- illustrative -->\n```bash\nexit 3\n```\n"
        "- item\n  ```bash\n  true\n  ```\n```sh\nfalse\n```\n```\nno\n```\n"
    )
    assert blocks(page) == [Block("python", 3, "x = 1\n"), Block("bash", 12, "true\n")]
    with pytest.raises(ValueError, match="line 2: a block that does not end"):
        blocks("a\n```python\nx")


def test_a_failing_block_is_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"page\.md:7"):
        run_bash("false\ntrue\n", tmp_path, "page.md:7")
