"""Short causal convolution over time, separate for each channel, followed by SiLU (paper, figure 2).

    y_t = SiLU( sum_{j=0}^{W-1} w_j x_{t - W + 1 + j} )

The inputs before the first token are zero, or the last W - 1 inputs of an earlier call (its state). Packed
sequences do not see each other. In PyTorch, the convolution runs over a row with W - 1 zeros in front of every
sequence. The kernels of `gka.ops.triton.conv`, if they can be used, read the packed sequences directly.

Legend: B batch, T time, C channels, W width of the convolution, N packed sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import check_state_indices
from ..ops.pool import gather_rows, scatter_rows_
from ..ops.transforms import transforms_active
from ..ops.triton import conv as conv_kernels
from ..ops.triton import conv_step as step_kernel
from .projections import is_plain


def sequence_of_tokens(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The sequence number of each token, [tokens] int64, from cu_seqlens [N + 1] int32 or int64, N at least 1.

    Invalid cu_seqlens give numbers from 0 to N - 1; the op refuses them later.
    """
    token = torch.arange(tokens, device=cu_seqlens.device)
    # Not in cu_seqlens[1:]: torch.compile of PyTorch 2.11 forgets on a GPU where such a view starts.
    sequence = torch.searchsorted(cu_seqlens.to(token.dtype), token, right=True) - 1
    return sequence.clamp(min=0, max=max(cu_seqlens.shape[0] - 2, 0))


class Gaps(NamedTuple):
    """Positions of packed tokens in a row with W - 1 zeros in front of every sequence.

    slots: [T] int64, the positions.
    length: length of the row, T + N (W - 1).
    """

    slots: Tensor
    length: int

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int, width: int) -> Gaps:
        """The positions for `tokens` tokens, packed by `cu_seqlens` [N + 1] of int32 or int64."""
        token, sequence = torch.arange(tokens, device=cu_seqlens.device), sequence_of_tokens(cu_seqlens, tokens)
        number = max(cu_seqlens.shape[0] - 1, 1)
        return cls(token + (width - 1) * (sequence + 1), tokens + (width - 1) * number)


class ShortConv(nn.Conv1d):
    """The convolution and SiLU; weight [C, 1, W], no bias.

    It is called as a module where hooks are registered, with every implementation; see `convolve`.

    Args:
        channels: C.
        width: W.
        **place: device and dtype.

    Raises:
        TypeError: other arguments, those of nn.Conv1d, which adapters give.
    """

    def __init__(self, channels: int, width: int, *others: Any, **place: Any) -> None:
        if others or not place.keys() <= {"device", "dtype"}:
            raise TypeError(
                "a short convolution takes no adapter, such as LoRA, made of convolutions; leave it out of "
                "target_modules, and train it by modules_to_save"
            )
        super().__init__(channels, channels, width, groups=channels, bias=False, **place)

    def forward(  # type: ignore[override]
        self, x: Tensor, state: Tensor | None = None, packed: Gaps | Tensor | None = None
    ) -> Tensor:
        """Convolve rows of tokens, or packed sequences.

        Args:
            x: [B, T, C], T at least 1; B is 1 with `packed`.
            state: the W - 1 inputs before x, [B, C, W - 1]; None means zeros. Not with `packed`.
            packed: the result of `packing`.

        Returns:
            [B, T, C].
        """
        if isinstance(packed, Gaps):
            row = x.new_zeros(x.shape[2], packed.length).index_copy(1, packed.slots, x[0].t())
            y = self._in_pytorch(row.unsqueeze(0))
            return y.index_select(2, packed.slots - (self.kernel_size[0] - 1)).transpose(1, 2)
        if packed is not None or conv_kernels.usable(x, self.kernel_size[0]):
            front = None if state is None else state.transpose(1, 2).to(x.dtype)
            return conv_kernels.short_convs([x], self.weight.squeeze(1), packed, front)[0]
        if state is None:
            state = x.new_zeros(x.shape[0], x.shape[2], self.kernel_size[0] - 1)
        return self._in_pytorch(torch.cat([state.to(x.dtype), x.transpose(1, 2)], dim=2)).transpose(1, 2)

    def _in_pytorch(self, inputs: Tensor) -> Tensor:
        """[B, C, W - 1 + T] -> [B, C, T]; the first W - 1 inputs are those before the first token."""
        if inputs.shape[2] == self.kernel_size[0]:  # one token: a dot product costs less than a convolution's call
            return F.silu((inputs * self.weight[:, 0]).sum(dim=2, keepdim=True).to(inputs.dtype))
        on_cpu = inputs.device.type == "cpu"
        if on_cpu and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return F.silu(self._by_shifts(inputs))
        return F.silu(super().forward(inputs))

    def _by_shifts(self, inputs: Tensor) -> Tensor:
        """The convolution as W shifted products in at least float32, which a compiler fuses with other operations.

        With a convolution, Inductor on the CPU fails if the number of tokens can change: it needs layouts that it
        cannot order (torch 2.13, pytorch issue 185510).
        """
        width = self.kernel_size[0]
        T = inputs.shape[2] - width + 1
        wide = torch.promote_types(inputs.dtype, torch.float32)
        x, weight = inputs.to(wide), self.weight.to(wide)
        parts = [x[..., j : j + T] * weight[:, 0, j : j + 1] for j in range(width)]
        return reduce(torch.add, parts).to(inputs.dtype)


def convolve(
    convolutions: Sequence[ShortConv | None],
    xs: Sequence[Tensor],
    states: Sequence[Tensor | None],
    packed: Gaps | Tensor | None,
) -> list[Tensor]:
    """The convolution of each x with its state; where there is no convolution, x.

    One launch does all where the kernels run. Convolutions that are watched or adapted are called one by one.
    """
    given = [(conv, x) for conv, x in zip(convolutions, xs, strict=True) if conv is not None]
    width = given[0][0].kernel_size[0]
    kernels = packed is not None or conv_kernels.usable(given[0][1], width)
    before = [state for conv, state in zip(convolutions, states, strict=True) if conv is not None]
    held = [state for state in before if state is not None]
    if kernels and not isinstance(packed, Gaps) and len(held) in (0, len(before)) and are_alike(given):
        front = torch.cat([state.to(given[0][1].dtype) for state in held], 1).transpose(1, 2) if held else None
        ys = iter(
            conv_kernels.short_convs([x for _, x in given], weights(conv for conv, _ in given), packed, front)
        )
        return [x if conv is None else next(ys) for conv, x in zip(convolutions, xs, strict=True)]
    calls = zip(convolutions, xs, states, strict=True)
    return [x if conv is None else conv(x, state, packed) for conv, x, state in calls]


def are_alike(given: Sequence[tuple[ShortConv, Tensor]]) -> bool:
    """Whether one launch may do all: no convolution is watched or adapted, and the xs have one dtype."""
    return len({x.dtype for _, x in given}) == 1 and all(is_plain(conv, ShortConv) for conv, _ in given)


def weights(convolutions: Iterable[ShortConv]) -> Tensor:
    """[sum of C, W]."""
    return torch.cat([conv.weight for conv in convolutions]).squeeze(1)


def packing(x: Tensor, cu_seqlens: Tensor, width: int) -> Gaps | Tensor:
    """Information on packed sequences for convolutions of width `width`, for several x of one shape and dtype.

    Returns `Gaps`, or for the kernels the position of each token in its sequence, [T] int32.
    """
    if not conv_kernels.usable(x, width):
        return Gaps.of(cu_seqlens, x.shape[1], width)
    sequence = sequence_of_tokens(cu_seqlens, x.shape[1])
    starts = cu_seqlens.long()[sequence].clamp(min=0)  # the op refuses others, after the convolutions
    return (torch.arange(x.shape[1], device=x.device) - starts).int()


def last_inputs(x: Tensor, state: Tensor | None, width: int, lengths: Tensor | None = None) -> Tensor:
    """The state after a call of the convolution: the last W - 1 inputs of every row.

    Args:
        x: [B, T, C], the input of the convolution.
        state: the W - 1 inputs before x, [B, C, W - 1]; None means zeros.
        width: W.
        lengths: [B] int64, the number of inputs of each row that count; None means all T.

    Returns:
        [B, C, W - 1], in the dtype of x.
    """
    (B, T, C), kept = x.shape, width - 1
    if lengths is None and kept <= T:
        return x[:, T - kept :].transpose(1, 2)
    state = x.new_zeros(B, C, kept) if state is None else state.to(x.dtype)
    if lengths is None:
        return torch.cat([state[..., T:], x.transpose(1, 2)], dim=2)
    place = lengths.unsqueeze(1) + torch.arange(-kept, 0, device=x.device)  # negative: in the state
    new = x.gather(1, place.clamp(min=0).unsqueeze(2).expand(-1, -1, C)).transpose(1, 2)
    old = state.gather(2, (place + kept).clamp(max=kept - 1).unsqueeze(1).expand(-1, C, -1))
    return torch.where(place.unsqueeze(1) < 0, old, new)


def short_conv_step(x: Tensor, weight: Tensor, pool: Tensor, state_indices: Tensor) -> Tensor:
    """The convolution and SiLU for one token of every sequence; the past of each is a row of a pool.

    It has no gradients.

    Args:
        x: [B, C], any float dtype.
        weight: [C, W], the weight of a `ShortConv` without its middle dim, W at least 2.
        pool: the last W - 1 inputs, the oldest first, [N, C, W - 1] with any strides: for a pool that lies in
            memory as [N, W - 1, C], pass its `transpose(1, 2)`. Any float dtype; written in place.
        state_indices: [B] int32 or int64, the row of each sequence. An index below 0 is padding: nothing is
            written, and y is 0. Two equal indices of at least 0 are undefined, and so is on a GPU an index of N
            or more.

    Returns:
        y [B, C] in the dtype of x; sums are at least float32.

    Raises:
        TypeError, ValueError: an argument does not fit; a gradient is needed, or a transform is active; on the
            CPU, an index of N or more.
    """
    _check_step(x, weight, pool, state_indices)
    if step_kernel.usable(x, weight.shape[1]):
        return step_kernel.conv_step(x, weight, pool, state_indices)
    wide = torch.promote_types(torch.promote_types(x.dtype, pool.dtype), torch.float32)
    inputs = torch.cat([gather_rows(pool, state_indices).to(wide), x.to(wide).unsqueeze(2)], dim=2)
    scatter_rows_(pool, state_indices, inputs[..., 1:])
    y = F.silu((inputs * weight.to(wide)).sum(dim=2)).to(x.dtype)
    return torch.where((state_indices >= 0).unsqueeze(1), y, torch.zeros_like(y))


def _check_step(x: Tensor, weight: Tensor, pool: Tensor, state_indices: Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, C]")
    if weight.ndim != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] < 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected [{x.shape[1]}, W], W at least 2")
    expected = (weight.shape[0], weight.shape[1] - 1)
    if pool.ndim != 3 or tuple(pool.shape[1:]) != expected:
        raise ValueError(f"pool has shape {tuple(pool.shape)}; expected [N, {expected[0]}, {expected[1]}]")
    for name, tensor in (("weight", weight), ("pool", pool)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected x's device, {x.device}")
    check_state_indices(state_indices, pool)
    if state_indices.shape[0] != x.shape[0]:
        raise ValueError(f"state_indices has shape {tuple(state_indices.shape)}; expected [{x.shape[0]}]")
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, pool))
    if differentiated or transforms_active():
        raise ValueError(
            "short_conv_step overwrites the pool, but an argument requires a gradient or a transform is active; "
            "call under torch.no_grad()"
        )
