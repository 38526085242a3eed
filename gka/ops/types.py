"""What every backend shares: the state, and the expansion of key/value heads."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class State(NamedTuple):
    """The two running sums, all that a sequence's past is kept in (spec of the paper, section 4.1).

    S_kk: [N, H, D, D], sum of decayed beta^2 k k^T, symmetric positive semidefinite; None where nothing
        is solved (`steps=()`).
    S_kv: [N, H, D, V], sum of decayed beta^2 k v^T.

    Both float32, or float64 for float64 inputs.
    """

    S_kk: Tensor | None
    S_kv: Tensor


def repeat_heads(tensor: Tensor, heads: int, dim: int = 2) -> Tensor:
    """Key/value heads repeated to `heads` query heads: query head h reads head h // (H / Hk)."""
    if tensor.shape[dim] == heads:
        return tensor
    return tensor.repeat_interleave(heads // tensor.shape[dim], dim=dim)
