"""Padding taken out of the way: in every row the real tokens move to the front, and back afterwards.

A pad may stand anywhere in a row. In front of the pads, and in their order, the real tokens are what a row without
padding would be, so a causal convolution and a recurrence need to know of the pads only how many there are. All
shapes stay as they are, and nothing waits for the device.

Legend: B batch, T time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.checks import require


def check_mask(attention_mask: Tensor, remedy: str = "pass packed sequences by cu_seqlens") -> None:
    """ValueError for a mask with values other than 0 and 1; on a GPU an assertion of the device.

    Some callers number packed sequences in the mask: 1 1 2 2 3. For one who reads it as "0 or not" they would be
    one sequence.
    """
    if attention_mask.dtype != torch.bool:
        fits = ((attention_mask == 0) | (attention_mask == 1)).all()
        require(
            fits, f"attention_mask has values other than 0 and 1; expected 0 for a pad, 1 for a token; {remedy}"
        )


class RealFirst:
    """The permutation of every row that puts its real tokens first, in their order.

    real: [B, T] of bool, which tokens are real, after the permutation.
    lengths: [B] of int64, the real tokens of each row.
    """

    def __init__(self, attention_mask: Tensor) -> None:
        """attention_mask: [B, T] of any dtype, 0 for a pad."""
        is_real = attention_mask != 0
        self._order = torch.argsort(~is_real, dim=1, stable=True)
        self._back = torch.argsort(self._order, dim=1)
        self.lengths = is_real.sum(dim=1)
        self.real = torch.arange(is_real.shape[1], device=is_real.device) < self.lengths.unsqueeze(1)

    def compress(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> the same with real tokens first and zeros behind them."""
        moved = x.gather(1, self._order.unsqueeze(2).expand_as(x))
        return moved.masked_fill(~self.real.unsqueeze(2), 0.0)

    def restore(self, x: Tensor) -> Tensor:
        """[B, T, dim], as `compress` orders it -> the original order, zero at pads."""
        cleared = x.masked_fill(~self.real.unsqueeze(2), 0.0)
        return cleared.gather(1, self._back.unsqueeze(2).expand_as(x))
