"""What the layers of a trained model solve: spectra of S_kk, memory of the gates, products for a residual.

    S_t   = exp(g_t) S_{t-1} + beta_t^2 k_t k_t^T       k_t of norm 1; e_1 >= ... >= e_D its eigenvalues
    rank  = exp(-sum_i p_i log p_i), p_i = e_i / sum_j e_j       effective rank: 1 to D
    top   = e_1 / ||S||_F
    below = whether a ||S||_F > e_i: the ridge is stronger than what S holds in direction i
    memory: the number n of tokens after which g_t + ... + g_{t-n+1} <= -1, so that a key counts 1/e of what it did
    products: the products with S that a solver needs until ||q - (S_hat + a I) x|| <= tolerance ||q||

All of this is float64, at some tokens ("positions") of a sequence.

Legend: T time, H heads, Hk key heads, D head dim, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gka.ops.conjugate_gradient import conjugate_gradient
from gka.ops.solvers import NORM_FLOOR, Chebyshev
from gka.ops.torch.products import products_needed
from gka.ops.types import Arguments, repeat_heads

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
MOST_PRODUCTS = 128
CHUNK = 64  # tokens that stop together in the op on a GPU
_CHUNKED_TOKENS, _CHUNKED_PRODUCTS = 4096, 64  # of a sequence and at most, for the products of whole chunks


class Inputs(NamedTuple):
    """The inputs of the op in one layer: q [1, T, H, D], k and v [1, T, Hk, D], gates [1, T, H] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    alpha: Tensor | None
    beta: Tensor | None


def unit(x: Tensor) -> Tensor:
    """x / (||x|| + 1e-6) over the last dim, in float64, as the layer normalises queries and keys."""
    x = x.double()
    return x / (x.norm(dim=-1, keepdim=True) + 1e-6)


def states_at(inputs: Inputs, positions: Sequence[int]) -> Tensor:
    """S_kk [P, H, D, D] after the tokens at rising positions, counted from 0."""
    H = inputs.q.shape[2]
    keys = repeat_heads(unit(inputs.k), H)[0].transpose(0, 1)  # [H, T, D]
    logs = inputs.g[0].double().cumsum(0).T  # [H, T]
    weight = torch.ones_like(logs) if inputs.beta is None else inputs.beta[0].double().square().T
    S, found, first = keys.new_zeros(H, keys.shape[2], keys.shape[2]), [], 0
    for position in positions:
        at = slice(first, position + 1)
        decayed = weight[:, at] * (logs[:, position, None] - logs[:, at]).exp()
        if first:
            S = S * (logs[:, position] - logs[:, first - 1]).exp()[:, None, None]
        S = S + (keys[:, at] * decayed[..., None]).transpose(1, 2) @ keys[:, at]
        found.append(S)
        first = position + 1
    return torch.stack(found)


def spectrum(S: Tensor, ridge_ratio: float) -> dict[str, Tensor]:
    """`rank` and `top` [P, H], `below` [P, H, D] with the largest eigenvalue first; see the module. On the CPU."""
    values = torch.linalg.eigvalsh(S.cpu()).flip(-1).clamp_min(0.0)  # small matrices are slow on a GPU
    norm = values.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
    share = values / values.sum(-1, keepdim=True).clamp_min(NORM_FLOOR)
    return {
        "rank": torch.special.entr(share).sum(-1).exp(),
        "top": values[..., 0] / norm[..., 0],
        "below": ridge_ratio * norm > values,
    }


def memory_at(g: Tensor, positions: Sequence[int]) -> Tensor:
    """Memory in tokens [P, H], at most position + 1, from g [1, T, H]."""
    logs = g[0].double().cumsum(0).T.contiguous()  # [H, T], falling
    at = torch.tensor(positions, device=g.device).expand(len(logs), -1).contiguous()
    reached = torch.searchsorted(-logs, -logs.gather(1, at) - 1.0, right=True)  # tokens of weight up to 1/e
    return (at + 1 - reached).T


def conjugate_gradient_products(S: Tensor, q: Tensor, ridge_ratio: float, tolerance: float) -> Tensor:
    """Products of each system [n], for S [n, D, D] of norm 1 and q [n, D]."""
    counts: list[Tensor] = []

    def product(x: Tensor) -> Tensor:
        return (S @ x.unsqueeze(-1)).squeeze(-1)

    conjugate_gradient(product, q, ridge_ratio, (MOST_PRODUCTS,), tolerance=tolerance, counts=counts)
    return counts[0].squeeze(-1)


def chebyshev_products(S: Tensor, q: Tensor, ridge_ratio: float) -> Tensor:
    """Products of each system for each of TOLERANCES [4, n]; MOST_PRODUCTS + 1 if these were not enough."""
    wanted = torch.tensor(TOLERANCES, dtype=q.dtype, device=q.device)[:, None]
    needed = torch.full((len(TOLERANCES), len(q)), MOST_PRODUCTS + 1, device=q.device)
    for products in range(MOST_PRODUCTS + 1):
        x = Chebyshev((products + 1,)).solve(S, q, ridge_ratio)
        residual = (S @ x.unsqueeze(-1)).squeeze(-1) + ridge_ratio * x - q
        reached = residual.norm(dim=-1) <= wanted * q.norm(dim=-1)
        needed = torch.where(reached & (needed > MOST_PRODUCTS), products, needed)
        if bool((needed <= MOST_PRODUCTS).all()):
            break
    return needed


def products_of_layer(inputs: Inputs, positions: Sequence[int], ridge_ratio: float) -> dict[str, dict[str, Any]]:
    """For each tolerance the products of "cg" and "chebyshev" at all positions and heads, and of "chunks".

    The products of chunks are those of the op, whose CHUNK tokens stop together; in float32, for each chunk of the
    first 4096 tokens and each head.
    """
    S = states_at(inputs, positions).flatten(0, 1)
    S = S / S.flatten(1).norm(dim=1).clamp_min(NORM_FLOOR)[:, None, None]
    q = unit(inputs.q[0, list(positions)]).flatten(0, 1)
    chebyshev = chebyshev_products(S, q, ridge_ratio)
    found = {}
    for number, tolerance in enumerate(TOLERANCES):
        found[f"{tolerance:g}"] = {
            "cg": conjugate_gradient_products(S, q, ridge_ratio, tolerance).tolist(),
            "chebyshev": chebyshev[number].tolist(),
            "chunks": _chunk_products(inputs, ridge_ratio, tolerance).flatten().tolist(),
        }
    return found


def _chunk_products(inputs: Inputs, ridge_ratio: float, tolerance: float) -> Tensor:
    """[chunks, H]."""
    cut = Inputs(*(None if x is None else x[:, :_CHUNKED_TOKENS].float() for x in inputs))  # type: ignore[arg-type]
    arguments = Arguments(
        *cut, S_kk=None, S_kv=None, cu_seqlens=None, ridge_ratio=ridge_ratio, solver_steps=(_CHUNKED_PRODUCTS,),
        scale=1.0, normalize_qk=True, chunk_size=CHUNK, solver="cg", tolerance=tolerance,
    )  # fmt: skip
    return products_needed(arguments)[0]
