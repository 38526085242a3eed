"""Tensor parallelism and FSDP2 on two GPUs (nccl)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_do_what_one_does(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "sharding_gpu_run",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    subprocess.run([*command, str(tmp_path)], check=True, env=environment, timeout=280)
    for rank in range(2):
        seen = json.loads((tmp_path / f"seen {rank}.json").read_text())
        worst = max(seen["gradients"], key=seen["gradients"].__getitem__)
        assert seen["gradients"][worst] < 1e-3, worst
        assert seen["tokens"]
        assert seen["losses"][-1] < seen["losses"][0]
