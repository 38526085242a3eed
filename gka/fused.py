"""The short convolution and the gated RMSNorm by flash-linear-attention's Triton kernels (the extra `cuda`).

    y = SiLU(causal convolution of x)           one kernel, no copy of x, no gaps between packed sequences
    y = o / rms(o) * weight * SiLU(gate)        one kernel

They run for tensors on a GPU where the package is installed; everywhere else `short_conv.py` and `layer.py` do the
same in PyTorch. The package is imported when the first such tensor comes, never on a machine without a GPU. As
custom operators its kernels are opaque to torch.compile, which traces shapes only.

Legend: B batch, T time, C channels, W width of the convolution, N sequences, D head dim.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

ENABLED = os.environ.get("GKA_FUSED", "1") != "0"  # False: PyTorch's own functions on every device
DEVICE = "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHUNK = 64  # tokens per program of the convolution
LEAST_TOKENS = 64  # fewer cost PyTorch no more than the launch of these kernels
MOST_CHUNKS = 65535  # what a grid takes in its second dimension


class Kernels(NamedTuple):
    """Functions of flash-linear-attention 0.6, called by keywords."""

    conv: Callable[..., Any]
    conv_backward: Callable[..., Any]
    norm: Callable[..., Any]
    norm_backward: Callable[..., Any]


@functools.cache
def kernels() -> Kernels | None:
    """The functions, or None where the package is not installed; one that does not fit is warned of, once."""
    if importlib.util.find_spec("fla") is None:
        return None
    try:
        from fla.modules.causal_conv1d import causal_conv1d_bwd, causal_conv1d_fwd
        from fla.modules.norm.fused_norm_gate import layer_norm_gated_bwd, layer_norm_gated_fwd
    except Exception as error:  # whatever an import of another version may raise
        warnings.warn(
            f"the installed flash-linear-attention does not fit ({error!r}): the short convolution and the gated "
            "norm run in PyTorch, slower; pip install 'gated-kalmanet[cuda]', or set GKA_FUSED=0 to hear no more",
            stacklevel=2,
        )
        return None
    return Kernels(causal_conv1d_fwd, causal_conv1d_bwd, layer_norm_gated_fwd, layer_norm_gated_bwd)


@torch.compiler.assume_constant_result
def installed() -> bool:
    """Whether `kernels` finds something; for torch.compile a constant."""
    return kernels() is not None


def usable(x: Tensor, sequences: int = 0) -> bool:
    """Whether x, [B, T, ...], is for the kernels: on a GPU, of 16 or 32 bits, not too few tokens, not too many.

    `sequences` are packed in x.
    """
    if not ENABLED or x.device.type != DEVICE or x.dtype not in DTYPES:
        return False
    return (
        x.numel() > 0
        and x.shape[1] >= LEAST_TOKENS
        and _most_chunks(x.shape[1], sequences) <= MOST_CHUNKS
        and installed()
    )


def _most_chunks(tokens: int, sequences: int) -> int:
    return (tokens + CHUNK - 1) // CHUNK + sequences


class Chunks(NamedTuple):
    """Packed sequences cut into pieces of CHUNK tokens.

    cu_seqlens: [N + 1] of int32 or int64; table: [NT, 2] of int64, sequence and number in it of every chunk. NT is
    at least their number, so that nothing waits for the device; the rest lies behind the end of the last sequence.
    """

    cu_seqlens: Tensor
    table: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int) -> Chunks:
        """Build it for `tokens` tokens."""
        sequences = cu_seqlens.shape[0] - 1
        counts = (cu_seqlens.long().diff() + CHUNK - 1) // CHUNK
        ends = counts.cumsum(0)
        numbers = torch.arange(_most_chunks(tokens, sequences), device=cu_seqlens.device)
        sequence = torch.searchsorted(ends, numbers, right=True).clamp(max=sequences - 1)
        return cls(cu_seqlens.contiguous(), torch.stack((sequence, numbers - (ends - counts)[sequence]), dim=1))


def short_conv(x: Tensor, weight: Tensor, state: Tensor | None = None, chunks: Chunks | None = None) -> Tensor:
    """Causal convolution and SiLU.

    Args:
        x: [B, T, C], of a dtype in DTYPES; B is 1 with chunks.
        weight: [C, W], any float dtype.
        state: the W - 1 inputs before x, [B, C, W - 1]; None means zeros. Not with chunks.
        chunks: of packed sequences.

    Returns:
        [B, T, C] in x's dtype.
    """
    if state is not None:  # the kernels want W columns and leave the first one alone
        state = torch.nn.functional.pad(state.to(x.dtype), (1, 0))
    y: Tensor = _short_conv(x, weight, state, *(chunks or (None, None)))
    return y


def gated_rms_norm(o: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm times SiLU(gate) over the last dim: o, gate [..., D] and weight [D] -> [..., D] in o's dtype."""
    y: Tensor = _gated_rms_norm(o, gate, weight, eps)[0]
    return y


def _loaded() -> Kernels:
    found = kernels()
    assert found is not None, "flash-linear-attention is gone"
    return found


@torch.library.custom_op("gka::short_conv", mutates_args=())
def _short_conv(
    x: Tensor, weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, table: Tensor | None
) -> Tensor:
    with torch.cuda.device_of(x):
        y, _ = _loaded().conv(
            x=x.contiguous(), weight=weight.contiguous(), bias=None, residual=None,
            initial_state=None if state is None else state.contiguous(), activation="silu",
            cu_seqlens=cu_seqlens, chunk_indices=table, chunk_size=CHUNK,
        )  # fmt: skip
    result: Tensor = y
    return result


@_short_conv.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("gka::short_conv_backward", mutates_args=())
def _short_conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    table: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and state; that of no state is empty."""
    with torch.cuda.device_of(x):
        dx, dweight, _, _, dstate = _loaded().conv_backward(
            x=x.contiguous(), dy=dy.contiguous(), dht=None, weight=weight.contiguous(),
            initial_state=None if state is None else state.contiguous(), activation="silu",
            cu_seqlens=cu_seqlens, chunk_indices=table, chunk_size=CHUNK,
        )  # fmt: skip
    return dx, dweight, x.new_empty(0) if dstate is None else dstate


@_short_conv_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, state: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(0 if state is None else state.shape)


def _save_conv(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_conv(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, state, *packing = ctx.saved_tensors
    dx, dweight, dstate = _short_conv_backward(dy, x, weight, state, *packing)
    return dx, dweight, None if state is None else dstate, None, None


_short_conv.register_autograd(_differentiate_conv, setup_context=_save_conv)


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
