"""The interface of context parallelism: what a layer asks of the part of a batch that its process has.

The tokens of a row are spread over processes. A process has one segment of consecutive tokens, or several of equal
length. `gka.distributed.Part` is the implementation; a layer needs only what is here.

Legend: B batch, T tokens of this process, H query heads, Hk key/value heads, D head dim, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ..ops import State
from .short_conv import ShortConv


class PartOfBatch(Protocol):
    """One process's part of a batch."""

    @property
    def segments(self) -> int:
        """Segments of equal length in each row; 1 for a packed batch, which has no padding."""
        ...

    def convolve(
        self, convolutions: Sequence[ShortConv | None], xs: Sequence[Tensor], lengths: Tensor | None
    ) -> list[Tensor]:
        """As `gka.nn.short_conv.convolve`, with the inputs before this part, which other processes have.

        Args:
            convolutions: of q, k and v; None leaves x as it is.
            xs: [B, T, C] each.
            lengths: [B segments] int64, the real tokens of each segment, which come first; None means all.
        """
        ...

    def gated_kalmanet(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, alpha: Tensor | None, beta: Tensor | None, **options: Any
    ) -> tuple[Tensor, State | None]:
        """As `gka.ops.gated_kalmanet`, with the tokens before this part; no state is returned."""
        ...
