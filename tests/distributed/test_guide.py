"""The script of docs/parallel.md runs in two processes."""

from __future__ import annotations

import re
from pathlib import Path

from forked import run_ranks

PAGE = Path(__file__).parents[2] / "docs" / "parallel.md"


def test_the_script_of_the_guide_trains() -> None:
    (script,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "ddp" in code)
    assert len(script.splitlines()) <= 35
    printed = re.findall(r"rank (\d), step (\d): loss (\d+\.\d+)", run_ranks("-c", script).stdout)
    losses = {(int(rank), int(step)): float(loss) for rank, step, loss in printed}
    assert len(losses) == 8
    for step in range(4):
        assert losses[0, step] == losses[1, step], "every rank has the loss of the whole row"
    assert losses[0, 3] < losses[0, 0] - 0.1
