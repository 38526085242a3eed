"""The packages stand in layers: no import runs upwards or in a circle (pyproject.toml, `tool.importlinter`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_no_import_runs_upwards_or_in_a_circle() -> None:
    pytest.importorskip("importlinter", reason="import-linter comes with the extra dev")
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
