"""`torchrun ... -m experiments evidence large`: two processes train as one does, stop together and resume."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import Done, run_forked
from tiny_run import write_texts

from experiments.evidence import command, large
from experiments.evidence.record import Record

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
STEPS = 8
KILLED = ("--kill", "experiments.evidence.large_training:Stop.on_step_end", "6")  # after the checkpoint of step 4


def torchrun(*arguments: str, kill: tuple[str, ...] = ()) -> Done:
    processes = ("--standalone", "--nproc_per_node", "2", "-m", "experiments", "evidence")
    return run_forked("-m", "elastic_run", *kill, *processes, *arguments, check=False, timeout=60)


def training(output: Path) -> dict[str, Any]:
    entries = Record(output / "large.json", "large").entries
    (found,) = [entry["result"] for entry in entries if entry["cell"]["part"] == "model"]
    return found  # type: ignore[no-any-return]


def plan(output: Path, steps: int) -> None:
    """Change the plan: so many steps, and a checkpoint after every fourth."""
    content = json.loads((output / "large.json").read_text())
    seconds = dict.fromkeys(content["cells"][0]["result"]["step seconds"], large._SAVE_SECONDS / 4)
    content["cells"][0]["result"] |= {"steps": steps, "step seconds": seconds}
    (output / "large.json").write_text(json.dumps(content))


def test_two_processes_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, output, one = write_texts(tmp_path / "texts"), tmp_path / "run", tmp_path / "one"
    options = ("large", "--device", "cpu", "--output", str(output), "--data", str(texts))
    monkeypatch.setattr(large, "step_seconds", lambda *_: 0.1)
    command.measure("large", "small", output, ["part=plan"], "cpu", [str(texts)])

    plan(output, 100_000)
    stopped = torchrun(*options, "--only", "mixer=gka", "--minutes", "0.1")
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stderr.count("the next start of the command resumes it") == 1
    assert len(list(output.glob("large/*/checkpoint-*"))) >= 1
    shutil.rmtree(output / "large")

    plan(output, STEPS)
    shutil.copytree(output, one)
    killed = torchrun(*options, "--only", "mixer=gka", kill=KILLED)
    assert killed.returncode == 1 and "SIGKILL" in killed.stderr
    resumed = torchrun(*options, "--only", "mixer=gka")
    assert resumed.returncode == 0, resumed.stderr
    command.measure("large", "small", one, ["mixer=gka"], "cpu", [str(texts)])
    both, alone = training(output), training(one)
    assert both["starts"] == [0, 4] and (both["processes"], alone["processes"]) == (2, 1)
    for name in ("train loss", "gradient norms", "evaluations"):
        assert [step for step, _ in both[name]] == [step for step, _ in alone[name]]
        assert [x for _, x in both[name]] == pytest.approx([x for _, x in alone[name]], rel=2e-3), name


def test_experiments_for_one_process_refuse_several(tmp_path: Path) -> None:
    refused = torchrun("numerics", "--output", str(tmp_path))
    assert refused.returncode == 1 and "torchrun started 2 processes; expected one for numerics" in refused.stderr
