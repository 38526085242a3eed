"""`gka train` by several processes that share sequences, weights or both: as by one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from forked import run_ranks
from helpers import relative_error
from safetensors.torch import load_file
from tiny_run import SETTINGS, command, logged, train, write_texts
from transformers.trainer_utils import get_last_checkpoint

from gka.cli import main as cli
from gka.cli.commands import TrainOptions
from gka.cli.parallel import check_parallel
from gka.cli.train import model_config
from gka.training.data import load_tokenizer
from gka.training.errors import UserError

CP: dict[str, Any] = {"context_parallel": 2}
TP: dict[str, Any] = {"tensor_parallel": 2}
FSDP: dict[str, Any] = {"fsdp": True}
CHANGES: dict[str, Any] = {"attention_layers": "1", "eval_every": 2, "eval_bytes": 350, "sample_tokens": 0}
# processes, how they share, sequences of each, accumulation, tokens of a sequence
CASES = {
    "CP 2": (2, CP, 4, 1, 32),
    "2 x CP 2": (4, CP, 1, 2, 30),
    "FSDP over CP 2, bfloat16": (2, {**FSDP, **CP, "dtype": "bfloat16"}, 4, 1, 32),
    "FSDP 2 x CP 2": (4, {**FSDP, **CP}, 1, 2, 30),
    "FSDP 2 x TP 2": (4, {**FSDP, **TP}, 2, 1, 32),
}


def assert_near(run: Path, other: Path, keys: list[str], bound: float) -> None:
    """What both have logged."""
    for key in keys:
        mine, theirs = (logged(place, key) for place in (run, other))
        assert list(mine) == list(theirs) and mine
        for step, value in theirs.items():
            assert mine[step] == pytest.approx(value, rel=bound), (key, step)


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_one_process(tmp_path: Path, name: str) -> None:
    """Groups of processes have batches of their own. The model is a hybrid; the length decides the layout.

    Validation fills up the last batch of several groups with other sequences, as that of several processes.
    """
    processes, shared, batch, accumulation, length = CASES[name]
    changes = {**CHANGES, "seq_len": length, "max_steps": 4}
    texts = write_texts(tmp_path / "texts")
    settings = {**SETTINGS, **changes, "batch_size": batch, "accumulation": accumulation, **shared}
    settings["gradient_checkpointing"] = True
    done = run_ranks(
        "-m", "gka", *command("train", output=tmp_path / "run", data=[texts], **settings), processes=processes
    )
    dtype = shared.get("dtype", "float32")
    assert train(tmp_path / "one", texts, dtype=dtype, **changes) == 0
    exact, keys = dtype == "float32", ["loss", *(["eval_loss"] if batch == 4 else [])]
    assert_near(tmp_path / "run", tmp_path / "one", keys, 1e-4 if exact else 5e-3)
    assert_near(tmp_path / "run", tmp_path / "one", ["grad_norm"], 1e-4 if exact else 0.15)
    assert done.stdout.count("bits per byte") == 1, "one process reports"
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written["tokens"] == json.loads((tmp_path / "one" / "metrics.json").read_text())["tokens"]


def test_a_run_moves_to_other_processes(tmp_path: Path) -> None:
    """From one to two that share weights, to two that share heads, and back: the same losses and weights."""
    changes, texts = {**CHANGES, "max_steps": 4, "tie_embeddings": True}, write_texts(tmp_path / "texts")
    moved, one = tmp_path / "moved", tmp_path / "one"
    assert train(one, texts, **changes) == 0
    shutil.copytree(one, moved)
    stages: list[tuple[int, int, list[str], dict[str, Any]]] = [
        (4, 6, ["--fsdp"], {"batch_size": 2}),
        (6, 8, ["--no-fsdp"], {"batch_size": 4, **TP}),
        (8, 9, [], {"tensor_parallel": 1}),
    ]
    for begun, steps, flags, options in stages:
        assert get_last_checkpoint(moved) == str(moved / f"checkpoint-{begun}")
        more = command("train", "--resume", max_steps=steps)
        assert cli.main([*more, "--output", str(one)]) == 0
        arguments = [*more, *flags, *command("train", output=moved, **options)[1:]]
        if flags:
            run_ranks("-m", "gka", *arguments)
        else:
            assert cli.main(arguments) == 0
        assert_near(moved, one, ["loss", "grad_norm"], 1e-4)
    mine, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (moved, one))
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert relative_error(mine[name], weight) < 1e-4, name
    with pytest.raises(AssertionError, match="has 4 sequences, now 8"):
        run_ranks("-m", "gka", *command("train", "--resume", output=moved))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "processes": (CP, "--context-parallel 2 needs a multiple of 2 processes, there are 1"),
    "both": ({**CP, **TP}, "--context-parallel 2 --tensor-parallel 2 needs a multiple of 4 processes"),
    "alone": (FSDP, "--fsdp needs several processes, there are 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    options, reason = REFUSED[name]
    texts = write_texts(tmp_path / "texts", files=2)
    assert cli.main(command("train", output=tmp_path / "run", data=[texts], device="cpu", **options)) == 2
    assert reason in capsys.readouterr().err


PROCESSES: dict[str, tuple[dict[str, Any], int, str]] = {
    "heads": (dict(heads=3, hidden_size=48, **TP), 2, "--heads 3 must be a multiple of --tensor-parallel, 2"),
    "no FSDP": (TP, 4, "--tensor-parallel 2 with 4 processes needs --fsdp"),
    "all heads": ({**FSDP, **TP}, 2, "--fsdp needs several processes beside the 2 of --tensor-parallel"),
    "compile": ({**FSDP, "compile": True}, 2, "--fsdp does not work with --compile"),
    "family": (dict(family="qwen3", **TP), 2, "--tensor-parallel 2 needs --family gka, not qwen3"),
    "short": (dict(seq_len=2, attention_layers=[0], context_parallel=4), 4, "--seq-len 2 must be at least"),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_what_does_not_fit_several_processes_is_refused(name: str) -> None:
    given, processes, reason = PROCESSES[name]
    options = TrainOptions(**given)
    with pytest.raises(UserError, match=reason):
        check_parallel(options, model_config(options, load_tokenizer(None)), processes)
