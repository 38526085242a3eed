"""The gated RMSNorm by the Triton kernels of `kernels/norm.py`: one launch, no copy.

    y = x / sqrt(mean(x^2) + eps) * weight * SiLU(gate)

They run for tensors on an NVIDIA GPU of compute capability 8.0 or later; `gka/nn/gated_norm.py` does the same in
PyTorch elsewhere. torch.compile meets a custom operator, of which it only traces shapes. Sums are made in one
order, so equal calls give equal bits. The kernels have first derivatives backwards;
gradients of gradients come from PyTorch.

Legend: V size of the last dim, N rows: product of all others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..transforms import gradients_with_graph, must_dispatch
from . import fused
from .config import norm_config

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
    y: Tensor = (_operator if must_dispatch(x) else _GatedRMSNorm.apply)(x, gate, weight, eps)
    return y


def _forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
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
    return y


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


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        _save(ctx, (x, gate, weight, eps), x)
        return _forward(x, gate, weight, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, dy)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, gate, weight = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        eps = ctx.eps
        return *gradients_with_graph(
            lambda x, gate, weight: [_in_pytorch(x, gate, weight, eps)], (x, gate, weight), (dy,)
        ), None
    return *(_backward_operator if must_dispatch(dy) else _backward)(dy, x, gate, weight, ctx.eps), None


def _in_pytorch(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`gated_rms_norm` in PyTorch, for derivatives that the kernels do not have."""
    y = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps) * F.silu(gate.float())
    return y.to(x.dtype)


_LIBRARY = torch.library.Library("gka", "FRAGMENT")
_INPUTS = "Tensor x, Tensor gate, Tensor weight, float eps"
_LIBRARY.define(f"gated_rms_norm({_INPUTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_LIBRARY.define(
    f"gated_rms_norm_backward(Tensor dy, {_INPUTS}) -> (Tensor, Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
)
_LIBRARY.impl("gated_rms_norm", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("gated_rms_norm_backward", _backward, "CompositeExplicitAutograd")
_operator = torch.ops.gka.gated_rms_norm.default
_backward_operator = torch.ops.gka.gated_rms_norm_backward.default


@torch.library.register_fake("gka::gated_rms_norm", lib=_LIBRARY)
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("gka::gated_rms_norm_backward", lib=_LIBRARY)
def _(dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


torch.library.register_autograd("gka::gated_rms_norm", _differentiate, setup_context=_save, lib=_LIBRARY)
