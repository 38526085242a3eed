"""The layer with one change that is not an option of the layer: another ridge, a sketch, or another solver.

    ridge     lambda_t = one number, in place of a ||S_kk_t||_F
    sketch    a system of d <= D dims: S_kk = sum of P k (P k)^T, x = P^T (S_kk + lambda I)^{-1} P q;
              P [Hk, d, D] is learned and starts with orthonormal rows, so that d = D starts as the layer itself
    solver    conjugate gradient in place of Chebyshev iteration, with as many products with S_kk, in one stage

Everything else is as in the layer: normalised q and k, beta, g, alpha (y = q + alpha (x - q)), the readout. The
code is chunk-wise with the equations of `gka.ops.torch.chunk_math`, in PyTorch on any device. Autograd
differentiates everything except the solve. The gradient of the solve is implicit (paper, lemma 2 and section 4.3):
with z = A^{-1} dx by the same solver, dq = z, and the inputs of A get the gradient of -z^T A x with z and x held
fixed. Conjugate gradient uses this gradient too. If it stops early, its adjoint solve is not the adjoint of its
solve; the paper warns of this.

The states of all chunks are in memory at once, [b, R, D, D], and the decay between chunks is computed for every
pair of chunks in a row. So this code is for training with a few thousand tokens per row, not for long rows.

Legend: B batch, T time, H query heads, Hk key/value heads, R = H / Hk, D dim of q, k and v, d dim of the system,
C tokens per chunk, n chunks of a row, b = B n Hk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gka.nn.layer import GatedKalmaNet
from gka.ops import State
from gka.ops.plan import Plan, default_solver_steps
from gka.ops.solvers import RIDGE_RATIO, node_steps
from gka.ops.torch.chunk_math import Chunks, Systems, decay_mask, readout, squared_norm, unit_rows
from gka.ops.torch.chunked import default_chunk_size
from gka.ops.types import state_dtype


@dataclass(frozen=True)
class Variant:
    """The change; the defaults change nothing.

    Attributes:
        ridge: lambda of every token, greater than 0; None means a ||S_kk_t||_F.
        sketch: d, 1 to D; None means no sketch.
        solver: "Chebyshev" or "conjugate gradient"; the latter needs the adaptive ridge.
        wide: whether 16-bit inputs are solved with float32 products too. If False, their products are bfloat16,
            and only the residuals between stages are float32.

    Raises:
        ValueError: a value is not one of these.
    """

    ridge: float | None = None
    sketch: int | None = None
    solver: Literal["Chebyshev", "conjugate gradient"] = "Chebyshev"
    wide: bool = False

    def __post_init__(self) -> None:
        if self.ridge is not None and not 0.0 < self.ridge < math.inf:
            raise ValueError(f"ridge is {self.ridge}; expected None or a finite number greater than 0")
        if self.sketch is not None and self.sketch < 1:
            raise ValueError(f"sketch is {self.sketch}; expected None or a dim of at least 1")
        if self.solver not in ("Chebyshev", "conjugate gradient"):
            raise ValueError(f"solver is {self.solver!r}; expected 'Chebyshev' or 'conjugate gradient'")
        if self.solver == "conjugate gradient" and self.ridge is not None:
            raise ValueError(f"ridge is {self.ridge}; expected None with conjugate gradient")


def with_variant(model: nn.Module, variant: Variant) -> nn.Module:
    """Change every GKA layer of a model in place. The weights stay; a sketch adds random P (global generator).

    Returns:
        The model.

    Raises:
        ValueError: the model has no GKA layer, or the sketch has more dims than a head.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GatedKalmaNet) and layer.solves]
    if not layers:
        raise ValueError('the model has no layer with mixer "gka"; expected at least one')
    for layer in layers:
        layer.__class__ = _Changed
        layer.change(variant)  # type: ignore[operator]
    return model


class _Changed(GatedKalmaNet):
    """A layer changed by `with_variant`, for whole sequences without a cache."""

    def change(self, variant: Variant) -> None:
        """Set the variant, and create P if it has a sketch."""
        d, D, weight = variant.sketch, self.head_dim, self.k_proj.weight
        if d is not None and d > D:
            raise ValueError(f"sketch is {d}; expected at most the head dim, {D}")
        self.variant, self.sketch = variant, None
        if d is not None:
            heads = self.num_kv_heads if self.proj_k is None else self.num_heads
            columns = torch.linalg.qr(torch.randn(heads, D, d)).Q
            self.sketch = nn.Parameter(columns.mT.contiguous().to(weight.device, weight.dtype))

    def _op(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        alpha: Tensor | None,
        beta: Tensor | None,
        past: Any,
        cu_seqlens: Tensor | None,
        state_wanted: bool,
    ) -> tuple[Tensor, State | None]:
        if past is not None or state_wanted or cu_seqlens is not None:
            raise ValueError("a changed layer takes neither a cache nor packed sequences; pass use_cache=False")
        with torch.autocast(q.device.type, enabled=False):
            o = changed_kalmanet(
                q, k, v, g, alpha, beta, self.variant, sketch=self.sketch, ridge_ratio=self.ridge_ratio,
                solver_steps=self.solver_steps, chunk_size=self.chunk_size,
            )  # fmt: skip
        return o, None


def changed_kalmanet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    variant: Variant,
    *,
    sketch: Tensor | None = None,
    ridge_ratio: float = RIDGE_RATIO,
    solver_steps: tuple[int, ...] | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """`gka.ops.gated_kalmanet` with normalize_qk=True and a variant; with `Variant()` the results are equal.

    Args:
        q, k, v, g, alpha, beta, ridge_ratio, solver_steps, chunk_size: as in `gated_kalmanet`. A constant ridge
            replaces ridge_ratio. Conjugate gradient uses sum(n - 1) products with S_kk, as many as the stages of
            Chebyshev iteration.
        sketch: P [Hk, d, D], any float dtype, if the variant has a sketch.

    Returns:
        o [B, T, H, V] in the dtype of q. All tensors have gradients. Except for the products of the solve, the
        computation is in float32, and in float64 for float64 inputs. If S_kk is zero, x = 0 without a gradient;
        with a constant ridge, x = q / lambda.
    """
    dtype, (B, T, _, D), Hk = state_dtype(q.dtype), q.shape, k.shape[2]
    method = _Method(
        variant,
        ridge_ratio,
        default_solver_steps(q.dtype) if solver_steps is None else solver_steps,
        torch.bfloat16 if q.dtype.itemsize == 2 and not variant.wide else dtype,
    )
    C = chunk_size or default_chunk_size(q.device)
    queries, keys = (unit_rows(x.to(dtype))[0] for x in (q, k))
    weight = torch.ones_like(g, dtype=dtype) if beta is None else beta.to(dtype).square()
    rows = _Rows(B, T, Hk, C)
    Q, K, Vv = rows.cut(queries), rows.cut(keys).squeeze(1), rows.cut(v.to(dtype)).squeeze(1)
    decay, weight = rows.cut(g.to(dtype)), rows.cut(weight)  # after the end both are 0, so the state stays
    chunks = Chunks.build(K, Vv, decay, weight)
    if sketch is None:
        K_s, Q_s = K, Q
    else:
        P = sketch.to(dtype)
        K_s = rows.cut(torch.einsum("hsd,bthd->bths", P, keys)).squeeze(1)
        Q_s = rows.cut(torch.einsum("hsd,bthrd->bthrs", P, queries.unflatten(2, (Hk, -1))).flatten(2, 3))
    total = decay.sum(-1)
    S_kk = rows.met(Chunks.build(K_s, K_s, decay, weight).increment(K_s), total)
    X = _Solve.apply(K_s, decay, weight, S_kk, Q_s, method)  # type: ignore[no-untyped-call]
    if sketch is not None:
        X = torch.einsum("hsd,bhrcs->bhrcd", P, X.unflatten(0, (-1, Hk))).flatten(0, 1)
    Y = X if alpha is None else torch.lerp(Q, X, rows.cut(alpha.to(dtype)).unsqueeze(-1))
    o = readout(chunks, rows.met(chunks.increment(Vv), total), Y) * D**-0.5
    return rows.joined(o).to(q.dtype)


@dataclass(frozen=True)
class _Rows:
    """The division of rows of tokens into chunks."""

    B: int
    T: int
    Hk: int
    C: int

    def cut(self, x: Tensor) -> Tensor:
        """[B, T, h, ...] -> [b, h / Hk, C, ...], with zeros after the end."""
        pad = -self.T % self.C
        x = torch.cat([x, x.new_zeros(self.B, pad, *x.shape[2:])], 1) if pad else x
        x = x.unflatten(2, (self.Hk, -1)).unflatten(1, (-1, self.C))  # [B, n, C, Hk, R, ...]
        return x.movedim(2, 4).flatten(0, 2)

    def joined(self, x: Tensor) -> Tensor:
        """The inverse of `cut`: [b, R, C, ...] -> [B, T, H, ...]."""
        x = x.unflatten(0, (self.B, -1, self.Hk)).movedim(4, 2)
        return x.flatten(3, 4).flatten(1, 2)[:, : self.T]

    def met(self, added: Tensor, total: Tensor) -> Tensor:
        """The state at the start of each chunk, [b, R, i, j].

        added: the sum that each chunk adds; total: the sum of g of each chunk, [b, R].

        All chunks are computed at once: chunk m reaches chunk n > m with the decay of the chunks between them.
        """
        by_row = total.unflatten(0, (self.B, -1, self.Hk)).flatten(2).transpose(1, 2)  # [B, H, n]
        M, _ = decay_mask(by_row)
        before = F.pad(M[..., :-1, :], (0, 0, 1, 0))
        flat = added.unflatten(0, (self.B, -1, self.Hk)).flatten(2, 3).flatten(3).transpose(1, 2)  # [B, H, n, i j]
        return (before @ flat).transpose(1, 2).reshape(added.shape)


@dataclass(frozen=True)
class _Method:
    """The method that solves the systems of a call."""

    variant: Variant
    ridge_ratio: float
    solver_steps: tuple[int, ...]
    product_dtype: torch.dtype

    def systems(self, chunks: Chunks, S_0: Tensor) -> Systems:
        return Systems.build(chunks, S_0, self.ridge_ratio, self.plan, self.product_dtype)

    @property
    def plan(self) -> Plan:
        """Conjugate gradient has as many products as the stages of Chebyshev iteration, in one stage."""
        if self.variant.solver == "Chebyshev":
            return Plan(self.solver_steps)
        return Plan((sum(n - 1 for n in self.solver_steps),), "cg")

    def solve(self, systems: Systems, rhs: Tensor) -> Tensor:
        """X [b, R, C, d] with (S_c + lambda_c I) X_c = rhs_c."""
        if self.variant.ridge is not None:
            return self._with_constant_ridge(systems, rhs, self.variant.ridge)
        return systems.solve(rhs)

    def _with_constant_ridge(self, systems: Systems, rhs: Tensor, ridge: float) -> Tensor:
        """Chebyshev nodes of [lambda, ||S_c||_F + lambda]; every token has its own."""
        norm = systems.norm.unsqueeze(-1)
        unscaled = replace(systems, inverse_norm=torch.ones_like(systems.norm))
        rough, exact = unscaled.matvec(self.product_dtype), unscaled.matvec(rhs.dtype)

        def stage(rhs: Tensor, nodes: int) -> Tensor:
            # 1 / tau - a is the position of the node in [0, 1], for every a
            places = [1.0 / tau - RIDGE_RATIO for tau in node_steps(nodes, RIDGE_RATIO)]
            x = rhs / (ridge + norm * places[0])
            for place in places[1:]:
                x = x + (rhs - rough(x) - ridge * x) / (ridge + norm * place)
            return x

        x = stage(rhs, self.solver_steps[0])
        for nodes in self.solver_steps[1:]:
            x = x + stage(rhs - exact(x) - ridge * x, nodes)
        return x


class _Solve(torch.autograd.Function):
    """X of the systems of K [b, C, d], g and beta^2 [b, R, C], S_0 [b, R, d, d] (symmetric) and Q [b, R, C, d]."""

    @staticmethod
    def forward(ctx: Any, K: Tensor, g: Tensor, weight: Tensor, S_0: Tensor, Q: Tensor, method: _Method) -> Tensor:
        X = method.solve(method.systems(Chunks.build(K, K, g, weight), S_0), Q)
        ctx.save_for_backward(K, g, weight, S_0, X)
        ctx.method = method
        return X

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of <z, A x> with z and x held fixed: <z, S x> + lambda <z, x>, lambda = a ||S||_F."""
        (dX,), method = gradients, ctx.method
        *inputs, X = ctx.saved_tensors
        with torch.autocast(dX.device.type, enabled=False):
            leaves = [x.detach().requires_grad_() for x in inputs]
            with torch.enable_grad():
                K, g, weight, S_0 = leaves
                chunks = Chunks.build(K, K, g, weight)
                products = readout(chunks, S_0, X)  # X S: keys take the role of values
            fixed = Chunks(*(x.detach() for x in vars(chunks).values()))
            systems = method.systems(fixed, S_0.detach())
            Z = method.solve(systems, dX)
            with torch.enable_grad():
                energy = (Z * products).sum()
                if method.variant.ridge is None:
                    # d||S|| = d(||S||^2) / (2 ||S||); zero if S = 0
                    w = method.ridge_ratio * (Z * X).sum(-1) * systems.inverse_norm
                    KS = torch.matmul(K.unsqueeze(1), S_0)
                    energy = energy + (0.5 * w * squared_norm(chunks, S_0, KS)).sum()
                found = torch.autograd.grad(-energy, leaves)
        return *found, Z, None
