"""One token of the short convolution by a kernel of `kernels/conv.py`, with its past in rows of a pool.

    y_t = SiLU( sum_{j=0}^{W-1} w_j x_{t-j} )

As a custom operator that writes the pool, it is opaque to torch.compile. It has no gradients.

Legend: B sequences, C channels, W width of the convolution, N rows of the pool.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..transforms import must_dispatch
from . import fused
from .conv import MOST_TAPS

CHANNELS, WARPS = 256, 2  # of a program


def usable(x: Tensor, width: int) -> bool:
    """Whether x, [B, C], is for the kernel: on a GPU that runs it, of 16 or 32 bits."""
    return width <= MOST_TAPS and fused.enabled(x)


def conv_step(x: Tensor, weight: Tensor, pool: Tensor, state_indices: Tensor) -> Tensor:
    """y [B, C] in the dtype of x; the checked arguments are those of `gka.nn.short_conv.short_conv_step`."""
    if must_dispatch(x):
        traced: Tensor = _conv_step_(x, weight, pool, state_indices)
        return traced
    y = _launch(x, weight, pool, state_indices)
    if not pool.is_inference():
        torch.autograd.graph.increment_version(pool)
    return y


def _launch(x: Tensor, weight: Tensor, pool: Tensor, state_indices: Tensor) -> Tensor:
    from .kernels.conv import convolve_step  # Triton is needed where the kernel runs, not where it is traced
    from .launch import launch, on_device

    (B, C), W = x.shape, weight.shape[1]
    y = torch.empty(B, C, dtype=x.dtype, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    with on_device(x.device):
        launch(convolve_step, B * -(-C // CHANNELS),
            x_ptr=x, weight_ptr=weight.contiguous(), pool_ptr=pool, index_ptr=state_indices.contiguous(), y_ptr=y,
            C=C, x_stride=x.stride(0), row_stride=pool.stride(0), channel_stride=pool.stride(1),
            tap_stride=pool.stride(2), W=W, BC=CHANNELS, num_warps=WARPS,
        )  # fmt: skip
    return y


@torch.library.custom_op("gka::conv_step_", mutates_args=("pool",))
def _conv_step_(x: Tensor, weight: Tensor, pool: Tensor, state_indices: Tensor) -> Tensor:
    return _launch(x, weight, pool, state_indices)


@_conv_step_.register_fake
def _(x: Tensor, weight: Tensor, pool: Tensor, state_indices: Tensor) -> Tensor:
    return x.new_empty(x.shape)
