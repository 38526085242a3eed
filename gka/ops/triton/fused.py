"""Whether kernels run around the op, for short convolution, gates and gated norm: `GKA_FUSED=0` turns them off."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..transforms import transforms_active
from .config import INTERPRETED, runs_kernels

ENABLED = os.environ.get("GKA_FUSED", "1") != "0"  # False: PyTorch's own functions around the op on every device
DEVICE = "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def enabled(x: Tensor) -> bool:
    """Whether x is on a GPU that runs our kernels, of 16 or 32 bits, and nobody turned those around the op off.

    They have first derivatives backwards and no others: transforms and forward mode get PyTorch.
    """
    if not ENABLED or x.device.type != DEVICE or x.dtype not in DTYPES or transforms_active():
        return False
    return INTERPRETED or runs_kernels(x.device.index)
