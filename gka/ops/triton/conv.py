"""The short convolution and SiLU by the Triton kernels of `kernels/conv.py`: one launch, no copy of x.

    y_t = SiLU( sum_{j=0}^{W-1} w_j x_{t-j} )

They run for tensors on an NVIDIA GPU of compute capability 8.0 or later, packed or in rows, up to W = 8;
everywhere else `short_conv.py` does the same in PyTorch. Sums are made in one order, so that equal calls give
equal bits.

Legend: B batch, T time, C channels, W width of the convolution, N packed sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fused
from .config import conv_config
from .kernel_function import KernelFunction

MOST_TAPS = 8  # there, backwards, a thread has no register left
SPAN = 128  # tokens of a program


def usable(x: Tensor, width: int) -> bool:
    """Whether x, [B, T, C], is for the kernels: on such a GPU, of 16 or 32 bits, more than one token."""
    return x.shape[1] > 1 and x.numel() > 0 and width <= MOST_TAPS and fused.enabled(x)


def short_conv(x: Tensor, weight: Tensor, place: Tensor | None = None) -> Tensor:
    """Causal convolution and SiLU; zeros before the first token.

    Args:
        x: [B, T, C], of a dtype in `fused.DTYPES`; B is 1 with `place`.
        weight: [C, W], any float dtype; its last column is of the token itself.
        place: [T] of int32, the number of each token in its packed sequence.

    Returns:
        [B, T, C] in x's dtype; sums are float32.

    Raises:
        ValueError: x and weight are not on one device.
    """
    if (
        weight.device != x.device
    ):  # without the check, a weight on "meta" would make this a call that computes nothing
        raise ValueError(f"the convolution's weight is on {weight.device}; expected {x.device}, as x")
    return _function(x, weight, place)[0]


def _options(x: Tensor, weight: Tensor, place: Tensor | None, rows: int) -> tuple[int, dict[str, Any]]:
    """Number of programs and the kernels' named arguments."""
    (B, T, C), W = x.shape, weight.shape[1]
    config = conv_config(C, rows)
    programs = B * -(-T // SPAN) * -(-C // config["BC"])
    return programs, {"T": T, "C": C, "W": W, "PACKED": place is not None, "SPAN": SPAN, **config}


def _forward(x: Tensor, weight: Tensor, place: Tensor | None) -> tuple[Tensor]:
    from .kernels.conv import convolve  # Triton is needed where the kernel runs, not where it is traced
    from .launch import launch, on_device

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs, options = _options(x, weight, place, rows=8)
    with on_device(x.device):
        launch(convolve, programs,
            x_ptr=x.contiguous(), weight_ptr=weight.contiguous(), place_ptr=place, y_ptr=y, **options,
        )  # fmt: skip
    return (y,)


def _backward(dy: Tensor, x: Tensor, weight: Tensor, place: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    from .kernels.conv import convolve_backward
    from .launch import launch, on_device

    (B, T, C), W = x.shape, weight.shape[1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = torch.empty(B * -(-T // SPAN), C, W, dtype=torch.float32, device=x.device)
    programs, options = _options(x, weight, place, rows=max(4, W - 1))
    with on_device(x.device):
        launch(convolve_backward, programs,
            dy_ptr=dy.contiguous(), x_ptr=x.contiguous(), weight_ptr=weight.contiguous(), place_ptr=place,
            dx_ptr=dx, parts_ptr=parts, **options,
        )  # fmt: skip
    return dx, parts.sum(0).to(weight.dtype)


def _in_pytorch(x: Tensor, weight: Tensor, place: Tensor | None) -> tuple[Tensor]:
    """`short_conv` by W shifts, for derivatives that the kernels do not have."""
    wide, W = x.float(), weight.shape[1]
    y = wide * weight[:, -1]
    for j in range(1, W):
        shifted = F.pad(wide, (0, 0, j, 0))[:, : x.shape[1]]
        if place is not None:
            shifted = torch.where((place >= j).unsqueeze(1), shifted, 0.0)
        y = y + shifted * weight[:, W - 1 - j]
    return (F.silu(y).to(x.dtype),)


_function = KernelFunction(
    "short_conv",
    ("Tensor x", "Tensor weight", "Tensor? place"),
    differentiable=2,
    outputs=1,
    empty=lambda x, *_: (x.new_empty(x.shape),),
    forward=_forward,
    backward=_backward,
    in_pytorch=_in_pytorch,
)
