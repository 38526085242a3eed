"""How many products a tolerance needs: for tables and choices, not for the op itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Arguments
from .chunked_inputs import ChunkedInputs


@torch.no_grad()
def products_needed(arguments: Arguments) -> list[Tensor]:
    """Products of conjugate gradient in the forward solve, for each stage and chunk.

    Args:
        arguments: checked arguments of `gated_kalmanet` with solver "cg".

    Returns:
        For each stage [chunks, H] in the state's dtype: in each block of chunks, sequence by sequence.

    Raises:
        ValueError: the solver has a fixed number of products.
    """
    if arguments.tolerance is None:
        raise ValueError(f"tolerance is None; the products are {arguments.plan.products} for every chunk")
    p, found = ChunkedInputs(arguments), list[list[Tensor]]()
    for group in p.groups:
        carry = p.carries(group)
        for block in group.blocks:
            index, chunks, first_kk, _, Q = p.inputs(block, carry)
            counts: list[Tensor] = []
            p.systems(chunks, first_kk).solve(p.zero_at_padding(Q, index), counts)
            found.append([count.reshape(-1, p.H) for count in counts])
    return [torch.cat(stage) for stage in zip(*found, strict=True)]
