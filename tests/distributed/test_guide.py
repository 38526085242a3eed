"""The scripts of docs/parallel.md run in several processes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from forked import run_ranks

import gka

PAGE = Path(__file__).parents[2] / "docs" / "parallel.md"


def script_with(word: str) -> str:
    """The only script of the page with that word that starts a process group for torchrun."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    (script,) = (code for code in blocks if word in code and 'os.environ["LOCAL_RANK"]' in code)
    return str(script)


def losses_of(script: str, processes: int) -> dict[tuple[int, int], float]:
    """The printed losses by rank and step."""
    printed = run_ranks("-c", script, processes=processes).stdout
    found = re.findall(r"rank (\d), step (\d): loss (\d+\.\d+)", printed)
    return {(int(rank), int(step)): float(loss) for rank, step, loss in found}


def test_the_script_with_context_parallelism_trains() -> None:
    script = script_with("DistributedDataParallel(model)")
    assert len(script.splitlines()) <= 35
    losses = losses_of(script, 2)
    assert len(losses) == 8
    for step in range(4):
        assert losses[0, step] == losses[1, step], "every process has the loss of the whole batch"
    assert losses[0, 3] < losses[0, 0] - 0.1


def test_the_script_with_fsdp_and_tensor_parallelism_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks 0 and 1 share the heads and have the same sequences; 2 and 3 have others."""
    monkeypatch.chdir(tmp_path)
    losses = losses_of(script_with("shard_model(model"), 4)
    assert len(losses) == 16
    for step in range(4):
        first, same, other, same_as_other = (losses[rank, step] for rank in range(4))
        assert first == same and other == same_as_other and first != other
    assert losses[0, 3] < losses[0, 0] - 1
    assert len(os.listdir("runs/large/step-4")) > 4, "a part of each process, and the list of all"
    model = gka.GKAForCausalLM.from_pretrained("runs/large/model")
    tokens = torch.randint(256, (2, 65), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model(tokens, labels=tokens).loss < losses[0, 3], "the weights after the last step, whole"
