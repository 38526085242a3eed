"""Short causal convolution over time, channel by channel, and SiLU after it (paper, figure 2).

    y_t = SiLU( sum_{j=0}^{W-1} w_j x_{t - W + 1 + j} )

What lies before the first token is zero, or the last W - 1 inputs of an earlier call (its state). Packed sequences
do not see each other: the convolution runs over a row with W - 1 zeros in front of every sequence.

Legend: B batch, T time, C channels, W width of the convolution, N packed sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gaps(NamedTuple):
    """Where the tokens of packed sequences lie in a row that has W - 1 zeros in front of every sequence.

    slots: [T] of int64; length: of the row, T + N (W - 1).
    """

    slots: Tensor
    length: int

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int, width: int) -> Gaps:
        """Build it for `tokens` tokens, packed by `cu_seqlens` [N + 1] of int32 or int64."""
        token = torch.arange(tokens, device=cu_seqlens.device)
        number = cu_seqlens.shape[0] - 1
        sequence = torch.searchsorted(cu_seqlens[1:].to(token.dtype), token, right=True)
        sequence = sequence.clamp(max=max(number - 1, 0))  # that they do not end at the last token, the op refuses
        return cls(token + (width - 1) * (sequence + 1), tokens + (width - 1) * max(number, 1))


class ShortConv(nn.Conv1d):
    """The convolution and SiLU; weight [C, 1, W], no bias.

    Args:
        channels: C.
        width: W.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, C, W - 1 + T] -> [B, C, T]: what lies before the first token stands in front."""
        if inputs.shape[2] == self.kernel_size[0]:  # one token: a dot product costs less than a convolution's call
            return F.silu((inputs * self.weight[:, 0]).sum(dim=2, keepdim=True).to(inputs.dtype))
        return F.silu(super().forward(inputs))


def short_conv(conv: ShortConv, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Convolve rows of tokens.

    Args:
        conv: with C channels and width W.
        x: [B, T, C], T at least 1.
        state: the W - 1 inputs before x, [B, C, W - 1]; None means zeros.

    Returns:
        y [B, T, C], and the inputs with the state in front, [B, C, W - 1 + T], for `last_inputs`.
    """
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2], conv.kernel_size[0] - 1)
    inputs = torch.cat([state.to(x.dtype), x.transpose(1, 2)], dim=2)
    return conv(inputs).transpose(1, 2), inputs


def packed_short_conv(conv: ShortConv, x: Tensor, gaps: Gaps) -> Tensor:
    """Convolve packed sequences: x [1, T, C] -> y [1, T, C]."""
    row = x.new_zeros(x.shape[2], gaps.length).index_copy(1, gaps.slots, x[0].t())
    y = conv(row.unsqueeze(0))
    return y.index_select(2, gaps.slots - (conv.kernel_size[0] - 1)).transpose(1, 2)


def last_inputs(inputs: Tensor, width: int, lengths: Tensor | None = None) -> Tensor:
    """The state after a call of `short_conv`: the last W - 1 inputs of every row.

    Args:
        inputs: [B, C, W - 1 + T], as `short_conv` returns them.
        width: W.
        lengths: [B] of int64, how many of the T inputs of each row count; None means all.

    Returns:
        [B, C, W - 1].
    """
    kept = width - 1
    if lengths is None:
        return inputs[..., inputs.shape[2] - kept :]
    index = lengths[:, None, None] + torch.arange(kept, device=inputs.device)
    return inputs.gather(2, index.expand(-1, inputs.shape[1], -1))
