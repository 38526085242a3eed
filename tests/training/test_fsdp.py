"""transformers' Trainer with bf16, gradient checkpointing and accelerate's FSDP2, on two CPU processes (gloo)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from fsdp_run import SAVED, STEPS, losses, make_trainer, run
from helpers import relative_error
from safetensors.torch import load_file

from gka.training.fsdp_checkpoint import fit_checkpoint

CHECKPOINT, END = f"checkpoint-{SAVED}", f"checkpoint-{STEPS}"
# Of a loss beside that of the other mode. In bfloat16 FSDP2 computes in it all that autocast leaves in float32.
BOUNDS = {"float32": 1e-4, "bfloat16": 3e-2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two under FSDP2, each uninterrupted and from the other's checkpoint."""
    folder = tmp_path_factory.mktemp("fsdp")
    for precision in BOUNDS:
        run(folder / f"one {precision}", precision == "bfloat16", False)
    run_ranks("-m", "fsdp_run", str(folder))
    return folder


def seen(place: Path) -> dict[str, Any]:
    return json.loads((place / "seen.json").read_text())


def history(folder: Path) -> dict[str, float]:
    return losses(json.loads((folder / END / "trainer_state.json").read_text())["log_history"])


def assert_near(mine: dict[str, float], theirs: dict[str, float], bound: float) -> None:
    assert list(mine) == list(theirs) == [str(step) for step in range(1, STEPS + 1)]
    for step, loss in theirs.items():
        assert mine[step] == pytest.approx(loss, rel=bound), f"step {step}"


def test_the_model_is_sharded(place: Path) -> None:
    for precision in BOUNDS:
        found = seen(place)[precision]
        assert found["blocks"] == [True] * 3 and found["sharded"]
        assert found["local A_log"] == 2, "of four heads"


def test_without_help_accelerate_ignores_fsdp_on_cpus(place: Path) -> None:
    """When this fails, accelerate has learnt it, and `fsdp_on_cpus` can go."""
    assert seen(place)["without the type"] is False


@pytest.mark.parametrize("precision", BOUNDS)
def test_losses_are_those_of_one_process(place: Path, precision: str) -> None:
    assert_near(seen(place)[precision]["losses"], history(place / f"one {precision}"), BOUNDS[precision])


@pytest.mark.parametrize("precision", BOUNDS)
def test_fsdp_goes_on_from_the_checkpoint_of_one_process(place: Path, precision: str) -> None:
    assert_near(seen(place)[precision]["resumed"], history(place / f"one {precision}"), BOUNDS[precision])
    compare_weights(place / f"fsdp resumed {precision}", place / f"one {precision}" / END, precision)


@pytest.mark.parametrize("precision", BOUNDS)
def test_one_process_goes_on_from_the_checkpoint_of_fsdp(place: Path, precision: str, tmp_path: Path) -> None:
    source = place / f"fsdp {precision}"
    trainer = run(tmp_path, precision == "bfloat16", False, source / CHECKPOINT)
    assert_near(losses(trainer.state.log_history), seen(place)[precision]["losses"], BOUNDS[precision])
    compare_weights(tmp_path / END, source / END, precision)


def compare_weights(mine: Path, theirs: Path, precision: str) -> None:
    """All weights at the end, and how far they have moved from each other beside how far from the start."""
    a, b = (load_file(folder / "model.safetensors") for folder in (mine, theirs))
    assert a.keys() == b.keys()
    start = make_trainer(mine.parent / "start", False, False).model
    assert start is not None
    begun = start.state_dict()
    for name in a:
        moved = (b[name] - begun[name]).norm()
        assert (a[name] - b[name]).norm() <= {"float32": 2e-3, "bfloat16": 0.3}[precision] * moved, name


def test_moments_survive_the_way_there_and_back(place: Path, tmp_path: Path) -> None:
    """A checkpoint of FSDP2 made plain has the moments of one process, and none of FSDP's files."""
    copy = tmp_path / CHECKPOINT
    shutil.copytree(place / "fsdp float32" / CHECKPOINT, copy)
    plain = Path(fit_checkpoint(make_trainer(tmp_path / "run", False, False), copy))
    assert plain.name == f"plain-{CHECKPOINT}" and not (plain / "pytorch_model_fsdp.bin").exists()
    mine = torch.load(plain / "optimizer.pt", weights_only=True)
    theirs = torch.load(place / "one float32" / CHECKPOINT / "optimizer.pt", weights_only=True)
    assert mine["state"].keys() == theirs["state"].keys()
    for key, moments in theirs["state"].items():
        for name, value in moments.items():
            assert relative_error(mine["state"][key][name], value) < 1e-3, (key, name)
    for group, other in zip(mine["param_groups"], theirs["param_groups"], strict=True):
        assert group == other
    assert fit_checkpoint(make_trainer(tmp_path / "run", False, False), plain) == str(plain)


def test_a_checkpoint_of_something_else_is_refused(place: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", False, False)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        fit_checkpoint(trainer, tmp_path / "nothing")
    copy = tmp_path / CHECKPOINT
    shutil.copytree(place / "fsdp float32" / CHECKPOINT, copy)
    saved = torch.load(copy / "optimizer.bin", weights_only=True)
    saved["state"]["lm_head.weight"]["exp_avg"] = torch.zeros(3)
    torch.save(saved, copy / "optimizer.bin")
    with pytest.raises(ValueError, match=r"do not have the shape of lm_head.weight"):
        fit_checkpoint(trainer, copy)
    assert not list(tmp_path.glob("plain-*"))
    (copy / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(ValueError, match="FULL_STATE_DICT"):
        fit_checkpoint(trainer, copy)
