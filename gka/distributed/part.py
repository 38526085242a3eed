"""A rank's part of one batch, as layers and attention need it: `gka.nn.part.PartOfBatch`.

    layer(hidden_states, context_parallel=Part(context.shard(T)))

torch.compile leaves the methods as they are, and compiles what is around them once for all plans.

Legend: B batch, T tokens of the global row, t tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._compile import _disable_dynamo  # `torch.compiler.disable`, without its import of the compiler

from ..nn.short_conv import ShortConv
from ..ops import State
from .halo import convolve_part
from .op import gated_kalmanet
from .shard import Shard


class Part:  # no dataclass: FSDP2 with a dtype of its own makes every dataclass among the arguments anew
    """This rank's part of one batch.

    shard: its tokens and sequences.
    real: [B, T] of bool, False for padding of the global rows, for softmax attention; None for no padding. The
        layers get the part of it that is this rank's as their attention_mask.
    """

    def __init__(self, shard: Shard, real: Tensor | None = None) -> None:
        self.shard, self.real = shard, real

    @property
    def segments(self) -> int:
        """Segments of equal length in each row; 1 for a packed batch, which has no padding."""
        return 1 if self.shard.packed else len(self.shard.segments)

    @_disable_dynamo
    def convolve(
        self, convolutions: Sequence[ShortConv | None], xs: Sequence[Tensor], lengths: Tensor | None
    ) -> list[Tensor]:
        """The short convolutions, with the inputs before this part; as in `gka.nn.part`."""
        return convolve_part(convolutions, xs, self.shard, lengths)

    @_disable_dynamo
    def gated_kalmanet(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, alpha: Tensor | None, beta: Tensor | None, **options: Any
    ) -> tuple[Tensor, State | None]:
        """The op, with the tokens before this part; as in `gka.nn.part`."""
        return gated_kalmanet(q, k, v, g, alpha, beta, shard=self.shard, **options)
