"""Short convolutions and SiLU by the Triton kernels of `kernels/conv.py`: one launch for all, no copy of x.

    y_t = SiLU( sum_{j=0}^{W-1} w_j x_{t-j} )

They run for tensors on an NVIDIA GPU of compute capability 8.0 or later, packed or in rows, up to W = 8;
everywhere else `short_conv.py` does the same in PyTorch. Sums are made in one order, so that equal calls give
equal bits.

Legend: B batch, T time, C channels, W width of the convolution, N packed sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fused
from .config import conv_config
from .kernel_function import KernelFunction

MOST_TAPS = 8  # there, backwards, a thread has no register left
SPAN = 128  # tokens of a program
FEW_TAPS, FEW_REGISTERS = 4, 104  # backwards these are enough; a compiler left free takes up to 168
STREAMS = 3  # tensors of one launch, at most


def usable(x: Tensor, width: int) -> bool:
    """Whether x, [B, T, C], is for the kernels: on such a GPU, of 16 or 32 bits, more than one token."""
    return x.shape[1] > 1 and x.numel() > 0 and width <= MOST_TAPS and fused.enabled(x)


def short_convs(
    xs: Sequence[Tensor], weight: Tensor, place: Tensor | None = None, front: Tensor | None = None
) -> list[Tensor]:
    """Causal convolution of up to three tensors and SiLU, by one launch.

    Args:
        xs: [B, T, C] each, C channels of its own, of one dtype in `fused.DTYPES`; B is 1 with `place`.
        weight: [sum of C, W], any float dtype; its last column is of the token itself.
        place: [T] of int32, the number of each token in its packed sequence.
        front: [B, W - 1, sum of C], the inputs before the first token of each row, in the dtype of xs; None means
            zeros. Not with `place`.

    Returns:
        [B, T, C] for each x, in its dtype; sums are float32.

    Raises:
        ValueError: weight and xs are not on one device.
    """
    if weight.device != xs[0].device:  # a weight on "meta" would make this a call that computes nothing
        raise ValueError(f"the convolution's weight is on {weight.device}; expected {xs[0].device}, as x")
    assert front is None or place is None, "packed sequences have no front"
    missing = [None] * (STREAMS - len(xs))
    return list(_function(*xs, *missing, weight, front, place)[: len(xs)])


def launch_forward(xs: Sequence[Tensor], weight: Tensor, front: Tensor) -> list[Tensor]:
    """`short_convs` of rows without autograd."""
    missing = [None] * (STREAMS - len(xs))
    return list(_forward(*xs, *missing, weight, front, None)[: len(xs)])


def launch_backward(
    dys: Sequence[Tensor], xs: Sequence[Tensor], weight: Tensor, front: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of the xs, of the weight and of the front, from those of the outputs of `launch_forward`."""
    missing = [None] * (STREAMS - len(xs))
    # Of a missing x nothing is read.
    *dxs, d_weight, d_front = _backward(*dys, *missing, *xs, *missing, weight, front, None)
    return dxs[: len(xs)], d_weight, d_front


def _options(
    xs: Sequence[Tensor | None], weight: Tensor, front: Tensor | None, place: Tensor | None, rows: int
) -> dict[str, Any]:
    """The kernels' named arguments but tensors of the size of x, and the number of programs."""
    (B, T, _), W = _first(xs).shape, weight.shape[1]
    channels = [0 if x is None else x.shape[2] for x in xs]
    config = conv_config(max(channels), rows)
    return {
        "programs": B * -(-T // SPAN) * sum(-(-C // config["BC"]) for C in channels),
        "weight_ptr": weight.contiguous(), "place_ptr": place,
        "front_ptr": None if front is None else front.contiguous(), "FRONT": front is not None,
        "T": T, "C0": channels[0], "C1": channels[1], "C2": channels[2],
        "W": W, "PACKED": place is not None, "SPAN": SPAN, **config,
    }  # fmt: skip


def _first(xs: Sequence[Tensor | None]) -> Tensor:
    x = xs[0]
    assert x is not None, "one x at least"
    return x


def _pointers(name: str, xs: Sequence[Tensor | None]) -> dict[str, Any]:
    """Named arguments of a kernel for tensors of the size of x; the first in place of those that there are not."""
    held = [_first(xs) if x is None else x for x in xs]
    return {f"{name}{number}_ptr": x for number, x in enumerate(held)}


def _in_rows(xs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in xs]


def _empty(*given: Tensor | None) -> tuple[Tensor, ...]:
    """Contiguous, in the shapes of the xs, which are the first inputs; empty for None."""
    like = _first(given)
    return tuple(like.new_empty((0,) if x is None else x.shape) for x in given[:STREAMS])


def _forward(*given: Any) -> tuple[Tensor, ...]:
    from .kernels.conv import convolve  # Triton is needed where the kernel runs, not where it is traced
    from .launch import launch, on_device

    *xs, weight, front, place = given
    ys = _empty(*xs)
    with on_device(weight.device):
        pointers = _pointers("x", _in_rows(xs)) | _pointers("y", ys)
        launch(convolve, **pointers, **_options(xs, weight, front, place, rows=8))
    return ys


def _backward(*given: Any) -> tuple[Tensor, ...]:
    """Gradients of the xs, of the weight and of the front."""
    from .kernels.conv import convolve_backward
    from .launch import launch, on_device

    dys, (*xs, weight, front, place) = given[:STREAMS], given[STREAMS:]
    (B, T, _), W = xs[0].shape, weight.shape[1]
    dxs = _empty(*xs)
    d_front = dys[0].new_empty(0) if front is None else front.new_empty(front.shape)
    parts = torch.empty(B * -(-T // SPAN), *weight.shape, dtype=torch.float32, device=weight.device)
    with on_device(weight.device):
        pointers = _pointers("dy", _in_rows(dys)) | _pointers("x", _in_rows(xs)) | _pointers("dx", dxs)
        options = _options(xs, weight, front, place, rows=max(4, W - 1))
        if W <= FEW_TAPS:
            options["maxnreg"] = FEW_REGISTERS
        held = None if front is None else d_front
        launch(convolve_backward, parts_ptr=parts, dfront_ptr=held, **pointers, **options)
    return *dxs, parts.sum(0).to(weight.dtype), d_front


def _in_pytorch(*given: Any) -> tuple[Tensor, ...]:
    """`short_convs` in PyTorch, for derivatives that the kernels do not have."""
    *xs, weight, front, place = given
    channels = [0 if x is None else x.shape[2] for x in xs]
    weights, empty = weight.split(channels), weight.new_empty(0)
    fronts = [None] * len(xs) if front is None else front.split(channels, 2)
    return tuple(
        empty if x is None else _by_shifts(x, w, before, place)
        for x, w, before in zip(xs, weights, fronts, strict=True)
    )


def _by_shifts(x: Tensor, weight: Tensor, front: Tensor | None, place: Tensor | None) -> Tensor:
    wide, T, W = x.float(), x.shape[1], weight.shape[1]
    y = wide * weight[:, -1]
    before = F.pad(wide, (0, 0, W - 1, 0)) if front is None else torch.cat([front.float(), wide], 1)
    for j in range(1, W):
        shifted = before[:, W - 1 - j : W - 1 - j + T]
        if place is not None:
            shifted = torch.where((place >= j).unsqueeze(1), shifted, 0.0)
        y = y + shifted * weight[:, W - 1 - j]
    return F.silu(y).to(x.dtype)


_function = KernelFunction(
    "short_convs",
    ("Tensor x0", "Tensor? x1", "Tensor? x2", "Tensor weight", "Tensor? front", "Tensor? place"),
    differentiable=5,
    outputs=STREAMS,
    empty=_empty,
    forward=_forward,
    backward=_backward,
    in_pytorch=_in_pytorch,
)
