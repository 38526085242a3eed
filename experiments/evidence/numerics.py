"""Errors of the solvers, and of gradients through them (compare figures 1 and 8 of arXiv 2511.21016).

iterations  ||A x - q|| / ||q|| and ||x - x*|| / ||x*|| after n products with S, for gradient descent, the same
            with momentum, conjugate gradient and Chebyshev iteration (three-term, nodes, nodes with refinement),
            with products in float32 and in bfloat16; on the systems of the tokens of a sequence
strengths   the same for Chebyshev nodes, with other ridge ratios a
gradients   ||g - g*|| / ||g*|| of all parameters, for one layer and for five, after n products
recursion   error of the readout along a sequence, for the classical Kalman recursion in bfloat16 and float32 and
            for the solve of the layer; each is compared with its own exact answer
retention   cosine between the value of an earlier token and the readout with the key of that token, by distance,
            for several ridges and gates and without a solve

The input is the family "correlated keys": unit keys around one common direction, unit queries around another,
rounded to bfloat16. The input of `retention` is normal. Vectors and sums are float64, so that only one thing is
rounded: the dtype of a cell rounds both factors of every product with S, except in the residuals of the
refinement. The Kalman recursion runs entirely in its dtype.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gka.ops import gated_kalmanet as op
from gka.ops.reference import gated_kalmanet, kalman_filter, ridge_regression
from gka.ops.solvers import RIDGE_RATIO, Chebyshev, ConjugateGradient, Exact, GradientDescent, Solver

from .numerics_page import picture_of, text_of
from .record import Cell

SUMMARY = "errors of the solvers, and of gradients through them"
BY_MACHINE = False
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRODUCTS = (1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 60)
GRADIENT_PRODUCTS = (5, 10, 15, 20, 30)
STRENGTHS = (0.01, 0.02, 0.05, 0.1)
GATES = (0.0, -0.001, -0.01, -0.1)
LAGS = (0, 4, 16, 64, 256)
WINDOW = 16  # the error of the recursion is the mean over so many tokens


def _halves(nodes: int) -> tuple[int, ...]:
    return (nodes - nodes // 2, nodes // 2) if nodes > 1 else (nodes,)


# From the number of products with S to a solver. The first step from zero needs no product, the residual of the
# refinement needs one, and the first step of the second stage needs none: n products make n + 1 nodes.
SOLVERS: dict[str, Callable[[int, torch.dtype], Solver]] = {
    "gradient descent": lambda n, dtype: GradientDescent(n + 1, product_dtype=dtype),
    "gradient descent, momentum": lambda n, dtype: GradientDescent(n + 1, momentum=True, product_dtype=dtype),
    "conjugate gradient": lambda n, dtype: ConjugateGradient((n,), product_dtype=dtype),
    "Chebyshev, three-term": lambda n, dtype: Chebyshev((n + 1,), "three_term", dtype),
    "Chebyshev, nodes": lambda n, dtype: Chebyshev((n + 1,), "nodes", dtype),
    "Chebyshev, nodes, refined": lambda n, dtype: Chebyshev(_halves(n + 1), "nodes", dtype),
}
METHODS: dict[str, Solver | torch.dtype] = {
    "Kalman recursion in float32": torch.float32,
    "Kalman recursion in bfloat16": torch.bfloat16,
    "Chebyshev (31,), bfloat16 products": Chebyshev((31,), "nodes", torch.bfloat16),
    "Chebyshev (16, 16), bfloat16 products": Chebyshev((16, 16), "nodes", torch.bfloat16),
}


def cells(size: str) -> list[Cell]:
    """Full: 512 tokens and 3 seeds. Small: 64 tokens and one seed."""
    tokens, seeds = (512, (0, 1, 2)) if size == "full" else (64, (0,))
    made: list[Cell] = []
    for seed in seeds:
        one: list[Cell] = []
        for solver, dtype in itertools.product(SOLVERS, DTYPES):
            one.append({"part": "iterations", "solver": solver, "dtype": dtype, "tokens": tokens})
        for a, dtype in itertools.product(STRENGTHS, DTYPES):
            one.append({"part": "strengths", "ridge_ratio": a, "dtype": dtype, "tokens": tokens})
        one += [{"part": "recursion", "method": method, "tokens": tokens} for method in METHODS]
        one += [
            {"part": "retention", "ridge_ratio": a, "log_gate": g, "tokens": 2 * tokens}
            for a, g in itertools.product((*STRENGTHS, None), GATES)
        ]
        for layers, solver, dtype in itertools.product((1, 5), SOLVERS, DTYPES):
            one.append({"part": "gradients", "layers": layers, "solver": solver, "dtype": dtype, "tokens": 32})
        made += [{**cell, "seed": seed} for cell in one]
    return made


def run(cell: Cell, folder: Path, device: torch.device) -> Any:
    """Measure a cell, always on the CPU, in float64 unless the cell says otherwise."""
    measure = {
        "iterations": _iterations,
        "strengths": _strengths,
        "recursion": _recursion,
        "gradients": _gradients,
        "retention": _retention,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small
    try:
        return measure[cell["part"]](cell)
    finally:
        torch.set_num_threads(threads)


def section(entries: list[dict[str, Any]], picture: Path) -> str:
    """Tables and text; the picture has one panel per part."""
    picture_of(entries, list(SOLVERS), list(METHODS), picture)
    return text_of(entries, list(SOLVERS), list(METHODS))


def token_inputs(T: int, D: int, m: float = 4.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [1, T, 1, D], rounded to bfloat16, and g [1, T, 1] = logsigmoid(N(m, 1)), all in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = (normal(1, T, 1, D) for _ in range(3))
    q, k = q + normal(1, 1, 1, D), k + normal(1, 1, 1, D)
    q, k = (nn.functional.normalize(x, dim=-1) for x in (q, k))
    g = nn.functional.logsigmoid(normal(1, T, 1) + m)
    q, k, v = (x.bfloat16().double() for x in (q, k, v))
    return q, k, v, g


def systems(q: Tensor, k: Tensor, g: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """S_hat [n, D, D] with norm 1 and q [n, D], for every `every`-th token."""
    S = torch.zeros(q.shape[-1], q.shape[-1], dtype=torch.float64)
    kept: list[Tensor] = []
    for t in range(q.shape[1]):
        S = g[0, t, 0].exp() * S + torch.outer(k[0, t, 0], k[0, t, 0])
        if t % every == every - 1:
            kept.append(S / S.norm())
    return torch.stack(kept), q[0, every - 1 :: every, 0]


@lru_cache(maxsize=1)
def _problem(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    q, k, _, g = token_inputs(tokens, 128, seed=seed)
    return systems(q, k, g, 8)


def _errors(cell: Cell, ridge_ratio: float, solvers: Iterable[Solver]) -> dict[str, list[float | None]]:
    """Residuals and errors of the solvers in their order; None if not finite."""
    S, q = _problem(cell["tokens"], cell["seed"])
    exact = Exact().solve(S, q, ridge_ratio)
    found: dict[str, list[float | None]] = {"residual": [], "error": []}
    for solver in solvers:
        x = solver.solve(S, q, ridge_ratio)
        residual = (S @ x.unsqueeze(-1)).squeeze(-1) + ridge_ratio * x - q
        found["residual"].append(_finite((residual.norm() / q.norm()).item()))
        found["error"].append(_finite(_relative(x, exact)))
    return found


def _iterations(cell: Cell) -> dict[str, Any]:
    make, dtype = SOLVERS[cell["solver"]], DTYPES[cell["dtype"]]
    return {"products": PRODUCTS, **_errors(cell, RIDGE_RATIO, (make(n, dtype) for n in PRODUCTS))}


def _strengths(cell: Cell) -> dict[str, Any]:
    dtype = DTYPES[cell["dtype"]]
    solvers = (Chebyshev((n + 1,), "nodes", dtype) for n in PRODUCTS)
    return {"products": PRODUCTS, **_errors(cell, cell["ridge_ratio"], solvers)}


def _recursion(cell: Cell) -> dict[str, Any]:
    """Mean errors over windows of tokens; None if not finite."""
    q, k, v, g = token_inputs(cell["tokens"], 64, seed=cell["seed"])
    g, ridge, method = torch.zeros_like(g), 0.25, METHODS[cell["method"]]
    if isinstance(method, torch.dtype):
        ref = (q.unsqueeze(-2) @ ridge_regression(k, v, g, ridge)).squeeze(-2)
        filtered = kalman_filter(k.to(method), v.to(method), g.to(method), ridge).double()
        out = (q.unsqueeze(-2) @ filtered).squeeze(-2)
    else:
        out, ref = (_layer(q, k, v, g, solver) for solver in (method, Exact()))
    error = (out - ref).norm(dim=-1)[0, :, 0] / ref.norm(dim=-1)[0, :, 0]
    means = error.unfold(0, WINDOW, WINDOW).mean(-1).tolist()
    return {
        "tokens": [WINDOW * (number + 1) for number in range(len(means))],
        "error": [_finite(value) for value in means],
    }


class Block(nn.Module):
    """x + W_o GKA(RMSNorm(x) W_q, .. W_k, .. W_v), the smallest residual block with the op in it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projections = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, g: Tensor, solver: Solver) -> Tensor:
        """x [1, T, width] and g [1, T, heads] -> [1, T, width]."""
        normed = nn.functional.rms_norm(x, x.shape[-1:])
        q, k, v = (linear(normed).unflatten(-1, (self.heads, -1)) for linear in self.projections[:3])
        q, k = (nn.functional.normalize(nn.functional.silu(y), dim=-1) for y in (q, k))
        o = _layer(q, k, v, g, solver)
        out: Tensor = self.projections[3](nn.functional.rms_norm(o, o.shape[-1:]).flatten(-2))
        return x + out


@lru_cache(maxsize=1)
def _network(seed: int, tokens: int) -> tuple[nn.ModuleList, Tensor, Tensor, Tensor]:
    """Five blocks, input, cotangent and g."""
    width, heads = 64, 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = nn.ModuleList(Block(width, heads) for _ in range(5)).double()
        x, cotangent = torch.randn(2, 1, tokens, width, dtype=torch.float64).unbind(0)
        g = nn.functional.logsigmoid(torch.randn(1, tokens, heads, dtype=torch.float64) + 4)
    return blocks, x, cotangent, g


@lru_cache(maxsize=2)
def _exact_gradient(seed: int, tokens: int, layers: int) -> Tensor:
    return _gradient(seed, tokens, layers, Exact())


def _gradient(seed: int, tokens: int, layers: int, solver: Solver) -> Tensor:
    """The gradient of all parameters of the first `layers` blocks, as one vector."""
    blocks, hidden, cotangent, g = _network(seed, tokens)
    for block in blocks[:layers]:
        hidden = block(hidden, g, solver)
    grads = torch.autograd.grad((hidden * cotangent).sum(), list(blocks[:layers].parameters()))
    return torch.cat([grad.flatten() for grad in grads])


def _gradients(cell: Cell) -> dict[str, Any]:
    place, make = (cell["seed"], cell["tokens"], cell["layers"]), SOLVERS[cell["solver"]]
    exact = _exact_gradient(*place)
    solvers = (make(n, DTYPES[cell["dtype"]]) for n in GRADIENT_PRODUCTS)
    errors = [_finite(_relative(_gradient(*place, solver), exact)) for solver in solvers]
    return {"products": GRADIENT_PRODUCTS, "error": errors}


def _retention(cell: Cell) -> dict[str, Any]:
    """Mean over heads. Lags longer than the sequence are left out. Without a ridge there is no solve."""
    T, heads, D = cell["tokens"], 16, 64
    generator = torch.Generator().manual_seed(cell["seed"])
    k, v = torch.randn(2, 1, T, heads, D, generator=generator, dtype=torch.float64).unbind(0)
    q, lags = k.clone(), [lag for lag in LAGS if lag < T // 2]
    asking = [T - 1 - number for number in range(len(lags))]
    for lag, t in zip(lags, asking, strict=True):
        q[:, t] = k[:, t - lag]
    g = torch.full((1, T, heads), cell["log_gate"], dtype=torch.float64)
    solve: dict[str, Any] = (
        {"solver_steps": ()} if cell["ridge_ratio"] is None else {"ridge_ratio": cell["ridge_ratio"]}
    )
    o, _ = op(q, k, v, g, normalize_qk=True, **solve)
    found = [
        nn.functional.cosine_similarity(o[0, t], v[0, t - lag], dim=-1).mean().item()
        for lag, t in zip(lags, asking, strict=True)
    ]
    return {"lags": lags, "cosine": [round(value, 4) for value in found]}


def _layer(q: Tensor, k: Tensor, v: Tensor, g: Tensor, solver: Solver) -> Tensor:
    return gated_kalmanet(
        q, k, v, g, None, None, ridge_ratio=RIDGE_RATIO, solver_steps=None, scale=1.0, initial_state=None,
        output_final_state=False, cu_seqlens=None, normalize_qk=False, solver=solver,
    )[0]  # fmt: skip


def _relative(out: Tensor, ref: Tensor) -> float:
    return ((out - ref).norm() / ref.norm()).item()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
