"""What the tests on a CUDA device share; the fixture `device` stands in conftest.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from helpers import INPUTS

TESTS = Path(__file__).parent


def on_two_gpus(module: str, *arguments: str) -> str:
    """What a module of this folder prints in two processes of torchrun, which must end without an error."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [*torchrun, "-m", module, *arguments]
    done = subprocess.run(command, check=True, env=environment, timeout=280, stdout=subprocess.PIPE, text=True)
    return done.stdout


def moved(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments on the device."""
    result = dict(arguments)
    for name in (*INPUTS, "cu_seqlens"):
        tensor = result.get(name)
        if tensor is not None:
            result[name] = tensor.detach().to(device)
    return result
