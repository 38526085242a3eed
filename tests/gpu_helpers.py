"""What the tests on a CUDA device share; the fixture `device` stands in conftest.py."""

from __future__ import annotations

from typing import Any

import torch
from helpers import INPUTS


def moved(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments on the device."""
    result = dict(arguments)
    for name in (*INPUTS, "cu_seqlens"):
        tensor = result.get(name)
        if tensor is not None:
            result[name] = tensor.detach().to(device)
    return result
