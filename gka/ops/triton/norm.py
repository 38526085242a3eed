"""The gated RMSNorm by the Triton kernels of `kernels/norm.py`: one launch, no copy.

    y = x / sqrt(mean(x^2) + eps) * weight * SiLU(gate)

They run for tensors on an NVIDIA GPU of compute capability 8.0 or later; `gka/nn/gated_norm.py` does the same in
PyTorch elsewhere. Sums are made in one order, so equal calls give equal bits.

Legend: V size of the last dim, N rows: product of all others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fused
from .config import norm_config
from .kernel_function import KernelFunction

FORWARD, BACKWARD = 1024, 1024  # numbers of each tensor that a program holds at once
PROGRAMS = 6 * 132  # at most, of the backward pass: as many as an H100 holds at once


def usable(x: Tensor) -> bool:
    """Whether x is for the norm's kernels: enabled, and not empty."""
    return x.numel() > 0 and fused.enabled(x)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm times SiLU(gate) over the last dim.

    Args:
        x, gate: [..., V], any float dtypes of at most 32 bits.
        weight: [V], the same.
        eps: added to the mean square, above 0.

    Returns:
        [..., V] in x's dtype; sums are float32.

    Raises:
        ValueError: shapes do not fit, or the tensors are not on one device.
    """
    if gate.shape != x.shape or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"x, gate and weight have shapes {tuple(x.shape)}, {tuple(gate.shape)} and {tuple(weight.shape)}; "
            "expected [..., V] twice and [V]"
        )
    if gate.device != x.device or weight.device != x.device:
        raise ValueError(f"gate and weight are on {gate.device} and {weight.device}; expected {x.device}, as x")
    return _function(x, gate, weight, eps)[0]


def _forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor]:
    from .kernels.norm import gated_norm  # Triton is needed where the kernel runs, not where it is traced
    from .launch import launch, on_device

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    N, V = x.shape[:-1].numel(), x.shape[-1]
    config = norm_config(V, FORWARD)
    if y.numel():
        with on_device(x.device):
            launch(gated_norm, -(-N // config["R"]),
                x_ptr=x.contiguous(), gate_ptr=gate.contiguous(), weight_ptr=weight.contiguous(), y_ptr=y,
                N=N, eps=eps, V=V, **config,
            )  # fmt: skip
    return (y,)


def _backward(dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and weight."""
    from .kernels.norm import gated_norm_backward
    from .launch import launch, on_device

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    N, V = x.shape[:-1].numel(), x.shape[-1]
    config = norm_config(V, BACKWARD)
    programs = min(PROGRAMS, -(-N // config["R"]))
    parts = torch.empty(programs, V, dtype=torch.float32, device=x.device)
    if dx.numel():
        with on_device(x.device):
            launch(gated_norm_backward, programs,
                dy_ptr=dy.contiguous(), x_ptr=x.contiguous(), gate_ptr=gate.contiguous(),
                weight_ptr=weight.contiguous(), dx_ptr=dx, dgate_ptr=dgate, parts_ptr=parts,
                N=N, eps=eps, V=V, **config,
            )  # fmt: skip
    return dx, dgate, parts.sum(0).to(weight.dtype)


def _in_pytorch(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor]:
    """`gated_rms_norm` in PyTorch, for derivatives that the kernels do not have."""
    y = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps) * F.silu(gate.float())
    return (y.to(x.dtype),)


_function = KernelFunction(
    "gated_rms_norm",
    ("Tensor x", "Tensor gate", "Tensor weight", "float eps"),
    differentiable=3,
    outputs=1,
    empty=lambda x, *_: (x.new_empty(x.shape),),
    forward=_forward,
    backward=_backward,
    in_pytorch=_in_pytorch,
)
