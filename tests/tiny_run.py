"""A run of `gka train` small enough for a test, in this process or in one of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from gka.cli.main import main

SETTINGS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "layers": 2,
    "heads": 2,
    "seq_len": 32,
    "batch_size": 4,
    "solver_steps": "8",
    "max_steps": 12,
    "log_every": 1,
    "eval_every": 6,
    "save_every": 4,
    "eval_bytes": 400,
    "validation_fraction": 0.2,
    "sample_tokens": 4,
    "device": "cpu",
}


def write_texts(folder: Path, files: int = 12, lines: int = 12) -> Path:
    """Write text files that differ, the same ones every time; return the folder."""
    draw = random.Random(0)
    words = "the of state gain ridge key value solve decay überall λ step\tπ".split(" ")
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        text = "".join(" ".join(draw.choices(words, k=7)) + "\n" for _ in range(lines))
        (folder / f"text{index}.txt").write_text(text, encoding="utf-8")
    return folder


def command(name: str, *positionals: str, **options: Any) -> list[str]:
    """The arguments of a command; True is a bare flag, a list is several values."""
    arguments = [name, *positionals]
    for key, value in options.items():
        arguments.append("--" + key.replace("_", "-"))
        if value is not True:
            arguments += list(map(str, value)) if isinstance(value, list) else [str(value)]
    return arguments


def train(output: Path, data: Path, **options: Any) -> int:
    """Run `gka train` in this process with SETTINGS changed by options; the exit code."""
    given = {**SETTINGS, **options}
    return main(command("train", output=output, data=[data], **given))


def run_process(
    *arguments: str, launcher: tuple[str, ...] = ("-m", "gka"), check: bool = True, **settings: Any
) -> subprocess.CompletedProcess[str]:
    """Run `python -m gka ARGUMENTS`, or another launcher, in a process of its own with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _path(), **settings.pop("env", {})}
    done = subprocess.run(
        [sys.executable, *launcher, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        **settings,
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


def _path() -> str:
    """The folders of the package and of the tests, for a process that starts elsewhere."""
    tests = Path(__file__).resolve().parent
    return os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])


def logged(output: Path, key: str = "loss") -> dict[int, float]:
    """What a run logged under that key, by step."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {logs["step"]: logs[key] for logs in history if key in logs}
