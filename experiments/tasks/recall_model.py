"""The model of Zoology's recall experiments (arXiv 2312.04927, figure 2) around any mixer.

    r = dropout(E[token] + P[position])                 P for softmax attention alone
    for each block:   r = r + mixer(LayerNorm(r)),   r = r + LayerNorm(r)
    logits = LayerNorm(r) E^T                           at the queries alone

The second line of a block is what Zoology's block does where its feed-forward part is the identity. All matrices
start normal with standard deviation 0.02, those into the residual stream with 0.02 / sqrt(2 blocks), biases at 0.
What is not a matrix (convolutions, decays, ridges) starts as its layer starts it. Zoology scales the output
projection of softmax attention alone; here every mixer's is.

Legend: B batch, T tokens of a sequence, P queries of a sequence, D model dim, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = 2
DROPOUT = 0.1  # of the embedding
FIRST_WEIGHTS = 0.02
_OUTPUTS = ("o_proj", "out_proj")
Build = Callable[[int, int], nn.Module]  # dim, block -> a layer [B, T, D] -> [B, T, D]


class RecallModel(nn.Module):
    """Two blocks with one mixer.

    Args:
        mixer: makes the layer of a block, from the model dim and the number of the block.
        vocab_size: V.
        dim: D.
        positions: T where the model has learned positions, 0 where it has none.
    """

    def __init__(self, mixer: Build, vocab_size: int, dim: int, positions: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(positions, dim) if positions else None
        self.dropout = nn.Dropout(DROPOUT)
        self.blocks = nn.ModuleList(_Block(mixer(dim, block), dim) for block in range(BLOCKS))
        self.norm = nn.LayerNorm(dim)
        self._first_weights()

    def forward(self, inputs: Tensor, queries: Tensor) -> Tensor:
        """Logits at the queries.

        Args:
            inputs: [B, T] token ids.
            queries: [B, P] int64, the positions of the queries.

        Returns:
            [B, P, V].
        """
        r = self.tokens(inputs)
        if self.positions is not None:
            r = r + self.positions.weight[: inputs.shape[1]]
        r = self.dropout(r)
        for block in self.blocks:
            r = block(r)
        asked = r.gather(1, queries.unsqueeze(-1).expand(-1, -1, r.shape[-1]))
        return F.linear(self.norm(asked), self.tokens.weight)

    @torch.no_grad()
    def _first_weights(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                into_stream = name.endswith(_OUTPUTS)
                nn.init.normal_(module.weight, std=FIRST_WEIGHTS / (math.sqrt(2 * BLOCKS) if into_stream else 1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=FIRST_WEIGHTS)


class _Block(nn.Module):
    def __init__(self, mixer: nn.Module, dim: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, r: Tensor) -> Tensor:
        mixed = self.mixer(self.norm1(r))
        r = r + (mixed[0] if isinstance(mixed, tuple) else mixed)  # layers of flash-linear-attention: (o, ...)
        return r + self.norm2(r)
