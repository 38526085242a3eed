"""The gated RMSNorm by flash-linear-attention's Triton kernels (the extra `cuda`).

    y = o / rms(o) * weight * SiLU(gate)        one kernel

They run for tensors on a GPU where the package is installed; everywhere else `layer.py` does the same in PyTorch.
The package is imported when the first such tensor comes, never on a machine without a GPU. As custom operators its
kernels are opaque to torch.compile, which traces shapes only.

Legend: B batch, T time, D head dim.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.triton import fused
from ..ops.triton.config import constant_when_compiled

LEAST_TOKENS = 64  # fewer cost PyTorch no more than the launch of these kernels


class Kernels(NamedTuple):
    """Functions of flash-linear-attention 0.6, called by keywords."""

    norm: Callable[..., Any]
    norm_backward: Callable[..., Any]


@functools.cache
def kernels() -> Kernels | None:
    """The functions, or None where the package is not installed; one that does not fit is warned of, once."""
    if importlib.util.find_spec("fla") is None:
        return None
    try:
        from fla.modules.norm.fused_norm_gate import layer_norm_gated_bwd, layer_norm_gated_fwd
    except Exception as error:  # whatever an import of another version may raise
        warnings.warn(
            f"the installed flash-linear-attention does not fit ({error!r}): the gated norm runs in PyTorch, "
            "slower; pip install 'gated-kalmanet[cuda]', or set GKA_FUSED=0 to hear no more",
            stacklevel=2,
        )
        return None
    return Kernels(layer_norm_gated_fwd, layer_norm_gated_bwd)


@constant_when_compiled
def installed() -> bool:
    """Whether `kernels` finds something; for torch.compile a constant."""
    return kernels() is not None


def usable(x: Tensor) -> bool:
    """Whether x, [B, T, ...], is for the norm's kernels: enabled, not too few tokens, the package installed."""
    # What is not installed must not make a graph depend on the number of tokens.
    return fused.enabled(x) and x.numel() > 0 and installed() and x.shape[1] >= LEAST_TOKENS


def gated_rms_norm(o: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm times SiLU(gate) over the last dim: o, gate [..., D] and weight [D] -> [..., D] in o's dtype."""
    y: Tensor = _gated_rms_norm(o, gate, weight, eps)[0]
    return y


def _loaded() -> Kernels:
    found = kernels()
    assert found is not None, "flash-linear-attention is gone"
    return found


@torch.library.custom_op("gka::gated_rms_norm", mutates_args=())
def _gated_rms_norm(o: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and 1 / rms of every row in float32, for the backward pass."""
    with torch.cuda.device_of(o):
        y, _, scale, _ = _loaded().norm(
            x=_rows(o), g=_rows(gate), weight=weight, bias=None, activation="swish", eps=eps, is_rms_norm=True
        )
    return y.view(o.shape), scale


@_gated_rms_norm.register_fake
def _(o: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return o.new_empty(o.shape), o.new_empty(o.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("gka::gated_rms_norm_backward", mutates_args=())
def _gated_rms_norm_backward(
    dy: Tensor, o: Tensor, gate: Tensor, weight: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of o, gate and weight."""
    with torch.cuda.device_of(o):
        do, dgate, dweight, *_ = _loaded().norm_backward(
            dy=_rows(dy), x=_rows(o), g=_rows(gate), weight=weight, bias=None, activation="swish", eps=eps,
            rstd=scale, is_rms_norm=True, x_dtype=o.dtype,
        )  # fmt: skip
    return do.view(o.shape), dgate.view(gate.shape).to(gate.dtype), dweight


@_gated_rms_norm_backward.register_fake
def _(
    dy: Tensor, o: Tensor, gate: Tensor, weight: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return o.new_empty(o.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors, output[1])


def _differentiate_norm(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    o, gate, weight, scale = ctx.saved_tensors
    return *_gated_rms_norm_backward(dy, o, gate, weight, scale, ctx.eps), None


_gated_rms_norm.register_autograd(_differentiate_norm, setup_context=_save_norm)
