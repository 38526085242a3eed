"""Tensor parallelism and FSDP2 on two GPUs (nccl)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gpu_helpers import on_two_gpus

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_do_what_one_does(tmp_path: Path) -> None:
    on_two_gpus("sharding_gpu_run", str(tmp_path))
    for rank in range(2):
        seen = json.loads((tmp_path / f"seen {rank}.json").read_text())
        worst = max(seen["gradients"], key=seen["gradients"].__getitem__)
        assert seen["gradients"][worst] < 1e-3, worst
        assert seen["tokens"]
        assert seen["losses"][-1] < seen["losses"][0]
