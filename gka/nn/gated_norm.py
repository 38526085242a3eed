"""RMSNorm times SiLU of a gate (paper, figure 2): with kernels on a GPU, otherwise in PyTorch.

y = o / sqrt(mean(o^2) + eps) * weight * SiLU(gate)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.triton import norm


def at_least_float32(x: Tensor) -> Tensor:
    """x if it has 32 or 64 bits, otherwise x converted to float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class GatedRMSNorm(nn.Module):
    """y = o / sqrt(mean(o^2) + eps) * weight * SiLU(gate), over the last dim, in at least 32 bits.

    Args:
        dim: size of the last dim.
        eps: added to the mean square.
        **place: device and dtype.
    """

    def __init__(self, dim: int, eps: float, **place: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, **place))
        self.eps = eps

    def extra_repr(self) -> str:
        """For `print`."""
        return f"{len(self.weight)}, eps={self.eps}"

    def forward(self, o: Tensor, gate: Tensor | None = None) -> Tensor:
        """o, gate: [B, T, ..., dim] -> [B, T, ..., dim] in the dtype of o; without a gate its factor is 1."""
        if gate is not None and norm.usable(o):
            return norm.gated_rms_norm(o, gate, self.weight, self.eps)
        wide = at_least_float32(o)
        y = F.rms_norm(wide, o.shape[-1:], self.weight.to(wide.dtype), self.eps)
        if gate is not None:
            y = y * F.silu(at_least_float32(gate))
        return y.to(o.dtype)
