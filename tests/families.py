"""The four families of inputs on which 16-bit accuracy is stated (D = V = 128).

k and q are normalised Gaussian rows, v Gaussian, all rounded to bfloat16; g = logsigmoid(N(0, 1) + m).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Family:
    """T tokens; m sets the memory's length; `common` adds one vector to all keys, another to all queries."""

    T: int
    m: float
    common: bool = False


FAMILIES = {
    "low-rank start": Family(128, 4.0),
    "short memory": Family(1024, 2.0),
    "correlated keys": Family(1024, 4.0, common=True),
    "long memory": Family(1024, 6.0),
}


def family_inputs(family: Family, H: int = 2, D: int = 128, seed: int = 0) -> dict[str, Tensor]:
    """q, k, v, g of a family, batch 1: [1, T, H, .]; q, k, v in bfloat16, g in float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = (normal(1, family.T, H, D) for _ in range(3))
    if family.common:
        q, k = q + normal(1, 1, H, D), k + normal(1, 1, H, D)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    g = torch.nn.functional.logsigmoid(normal(1, family.T, H) + family.m)
    return {"q": q.bfloat16(), "k": k.bfloat16(), "v": v.bfloat16(), "g": g.float()}
