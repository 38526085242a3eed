"""Autocast kept away from what chooses its dtypes itself."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast, whatever surrounds it; the meta device knows none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
