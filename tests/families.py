"""The four families of inputs on which 16-bit accuracy is stated (D = V = 128), and inputs of trained layers.

k and q are normalised Gaussian rows, v Gaussian, all rounded to bfloat16; g = logsigmoid(N(0, 1) + m).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

TRAINED = Path(__file__).parent / "trained_inputs.safetensors"  # made by `python -m benchmarks.capture_inputs`


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


def with_gates(inputs: dict[str, Tensor], random: bool, seed: int = 5) -> dict[str, Tensor]:
    """The inputs with alpha and beta, [1, T, H] in float32: random between 0 and 1, or 1."""
    generator, shape = torch.Generator().manual_seed(seed), inputs["g"].shape
    alpha, beta = (
        torch.sigmoid(torch.randn(shape, generator=generator)) if random else torch.ones(shape) for _ in range(2)
    )
    return {**inputs, "alpha": alpha, "beta": beta}


def gradients_of(out: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of what `helpers.run` returns, the gradients, both ways."""
    return {name: tensor for name, tensor in out.items() if name.split()[-1].startswith("d")}


def first_tokens(sequences: int, length: int, H: int = 2, D: int = 128, seed: int = 0) -> dict[str, Tensor]:
    """A packed batch of short sequences like the low-rank start, with `cu_seqlens`."""
    inputs = family_inputs(Family(sequences * length, 4.0), H, D, seed)
    return {**inputs, "cu_seqlens": torch.arange(sequences + 1) * length}


def trained_inputs(layer: int) -> dict[str, Tensor]:
    """Inputs of the op in a layer of a trained byte-level model, D = V = 64: q, k, v, g, alpha, beta.

    q and k are normalised and rounded to bfloat16, as those of the families.
    """
    saved = {
        name.removeprefix(f"{layer}."): x for name, x in load_file(TRAINED).items() if name.startswith(f"{layer}.")
    }
    for name in ("q", "k"):
        saved[name] = torch.nn.functional.normalize(saved[name].double(), dim=-1).bfloat16()
    return saved


TRAINED_LAYERS = (0, 1)
