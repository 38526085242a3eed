"""Models whose tokens two GPUs share, beside one GPU; `make test-gpu` runs it."""

from __future__ import annotations

import pytest
import torch
from forked import run_ranks


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_compute_what_one_does() -> None:
    assert "zigzag padding torch.bfloat16" in run_ranks("-m", "parallel_devices_run").stdout
