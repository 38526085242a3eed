"""`gka train --context-parallel`: processes that share every sequence train as one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import run_ranks
from tiny_run import SETTINGS, command, logged, train, write_texts

from gka.cli import main as cli


@pytest.mark.parametrize(("processes", "batch", "accumulation", "length"), [(2, 4, 1, 32), (4, 1, 2, 30)])
def test_losses_are_those_of_one_process(
    tmp_path: Path, processes: int, batch: int, accumulation: int, length: int
) -> None:
    """Four processes are two pairs, which have batches of their own. The model is a hybrid; the length decides the
    layout.

    Validation fills up the last batch of several pairs with other sequences, as that of several processes.
    """
    changes = {"attention_layers": "1", "seq_len": length, "max_steps": 4, "eval_every": 2, "eval_bytes": 350}
    texts = write_texts(tmp_path / "texts")
    settings = {**SETTINGS, **changes, "batch_size": batch, "accumulation": accumulation}
    settings |= {"context_parallel": 2, "gradient_checkpointing": True}
    done = run_ranks(
        "-m", "gka", *command("train", output=tmp_path / "run", data=[texts], **settings), processes=processes
    )
    assert train(tmp_path / "one", texts, **changes) == 0
    for key in ("loss", "grad_norm", *(["eval_loss"] if processes == 2 else [])):
        shared, one = logged(tmp_path / "run", key), logged(tmp_path / "one", key)
        assert list(shared) == list(one) and shared
        for step, value in one.items():
            assert shared[step] == pytest.approx(value, rel=1e-4), (key, step)
    assert done.stdout.count("bits per byte") == 1, "one process reports"
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written["tokens"] == json.loads((tmp_path / "one" / "metrics.json").read_text())["tokens"]


def test_what_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_texts(tmp_path / "texts", files=2)
    assert cli.main(command("train", output=tmp_path / "run", data=[texts], device="cpu", context_parallel=2)) == 2
    assert "needs a multiple of 2 processes, there are 1" in capsys.readouterr().err
