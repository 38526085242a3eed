"""Autocast: its dtype, and its absence around what chooses its dtypes itself."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast, whatever surrounds it; the meta device knows none."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to on the device; None where it is off, as on the meta device."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
