"""`gka train` by several processes that share sequences, weights or both: as by one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forked import run_ranks
from tiny_run import SETTINGS, command, logged, train, write_texts

from gka.cli import main as cli
from gka.hf.model import GKAForCausalLM

CP: dict[str, Any] = {"context_parallel": 2}
TP: dict[str, Any] = {"tensor_parallel": 2}
FSDP: dict[str, Any] = {"fsdp": True}
# processes, how they share, sequences of each, accumulation, tokens of a sequence
CASES = {
    "CP 2": (2, CP, 4, 1, 32),
    "2 x CP 2": (4, CP, 1, 2, 30),
    "FSDP 2": (2, FSDP, 2, 1, 32),
    "TP 2": (2, TP, 4, 1, 32),
    "FSDP 2 x CP 2": (4, {**FSDP, **CP}, 1, 2, 30),
    "FSDP 2 x TP 2": (4, {**FSDP, **TP}, 2, 1, 32),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_one_process(tmp_path: Path, name: str) -> None:
    """Groups of processes have batches of their own. The model is a hybrid; the length decides the layout.

    Validation fills up the last batch of several groups with other sequences, as that of several processes.
    """
    processes, shared, batch, accumulation, length = CASES[name]
    changes = {"attention_layers": "1", "seq_len": length, "max_steps": 4, "eval_every": 2, "eval_bytes": 350}
    texts = write_texts(tmp_path / "texts")
    settings = {**SETTINGS, **changes, "batch_size": batch, "accumulation": accumulation, **shared}
    settings["gradient_checkpointing"] = True
    done = run_ranks(
        "-m", "gka", *command("train", output=tmp_path / "run", data=[texts], **settings), processes=processes
    )
    assert train(tmp_path / "one", texts, **changes) == 0
    for key in ("loss", "grad_norm", *(["eval_loss"] if batch == 4 else [])):
        several, one = logged(tmp_path / "run", key), logged(tmp_path / "one", key)
        assert list(several) == list(one) and several
        for step, value in one.items():
            assert several[step] == pytest.approx(value, rel=1e-4), (key, step)
    assert done.stdout.count("bits per byte") == 1, "one process reports"
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written["tokens"] == json.loads((tmp_path / "one" / "metrics.json").read_text())["tokens"]


def test_what_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_texts(tmp_path / "texts", files=2)
    assert cli.main(command("train", output=tmp_path / "run", data=[texts], device="cpu", context_parallel=2)) == 2
    assert "needs a multiple of 2 processes, there are 1" in capsys.readouterr().err
