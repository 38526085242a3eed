"""Move padding behind the real tokens of every row, and back afterwards.

Padding may be anywhere in a row. After the move, the real tokens are in front and in order, as in a row without
padding. A causal convolution and a recurrence then need only the number of real tokens. All shapes stay the same,
and nothing waits for the device.

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
    """The permutation of every row, or of each of its equal segments, that puts real tokens first, in their order.

    real: [B, T] bool, True for real tokens, after the permutation.
    lengths: [B segments] int64, number of real tokens of each row or segment.
    """

    def __init__(self, attention_mask: Tensor, segments: int = 1) -> None:
        """attention_mask: [B, T] of any dtype, 0 for padding; T is a multiple of segments."""
        (B, T), self._segments = attention_mask.shape, segments
        is_real = (attention_mask != 0).reshape(B * segments, T // segments)
        self._order = torch.argsort(~is_real, dim=1, stable=True)
        self._back = torch.argsort(self._order, dim=1)
        self.lengths = is_real.sum(dim=1)
        front = torch.arange(is_real.shape[1], device=is_real.device) < self.lengths.unsqueeze(1)
        self.real = front.reshape(B, T)

    def compress(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, dim] with real tokens first and zeros after them."""
        return self._permuted(x, self._order).masked_fill(~self.real.unsqueeze(2), 0.0)

    def restore(self, x: Tensor) -> Tensor:
        """[B, T, dim] in the order of `compress` -> [B, T, dim] in the original order, zero at padding."""
        return self._permuted(x.masked_fill(~self.real.unsqueeze(2), 0.0), self._back)

    def _permuted(self, x: Tensor, order: Tensor) -> Tensor:
        rows = x.reshape(*order.shape, x.shape[2])
        return rows.gather(1, order.unsqueeze(2).expand_as(rows)).reshape(x.shape)
