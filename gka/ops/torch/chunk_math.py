"""The chunk-wise equations, for a block of chunks at a time (paper, section 4.2 and appendix).

Within a chunk with first state S_0, token c:  zeta_c = e^{g_1 + ... + g_c},
M_{c,j} = e^{g_{j+1} + ... + g_c} for j <= c, else 0,  and Mb_{c,j} = M_{c,j} beta_j^2:

    S_c = zeta_c S_0 + K^T diag(Mb_c) K                 X A = (X S_0) o zeta + ((X K^T) o Mb) K + lambda o X
    ||S_c||_F^2 = zeta_c^2 ||S_0||_F^2 + 2 zeta_c sum_j Mb_{c,j} k_j^T S_0 k_j
                  + sum_j [Mb (K K^T)^2]_{c,j} Mb_{c,j}          (the square is elementwise)
    O = scale * [(Y S_kv_0) o zeta + ((Y K^T) o Mb) V]

beta enters as a weight of the columns of M, so keys and values of a head group are read, never repeated.

Legend: b chunks times key/value heads (Hk); R = H / Hk query heads of each; C tokens; D, V dims.
Query-side tensors are [b, R, C, .], key-side tensors [b, C, .], states [b, R, D, .], masks [b, R, C, C].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..conjugate_gradient import Matvec
from ..plan import Plan
from ..solvers import NORM_FLOOR, Product, floored, inverse_or_zero, root


def cross(left: Tensor, keys: Tensor) -> Tensor:
    """X K^T, [b, R, C, D] and [b, C, D] -> [b, R, C, C], without repeating K."""
    b, R, C, D = left.shape
    return torch.bmm(left.reshape(b, R * C, D), keys.transpose(1, 2)).reshape(b, R, C, keys.shape[1])


def mix(weights: Tensor, keys: Tensor) -> Tensor:
    """P K, [b, R, C, C] and [b, C, D] -> [b, R, C, D], without repeating K."""
    b, R, C, J = weights.shape
    return torch.bmm(weights.reshape(b, R * C, J), keys).reshape(b, R, C, keys.shape[2])


def heads(left: Tensor, right: Tensor) -> Tensor:
    """One product for every query head, [b, R, i, j] and [b, R, j, k] -> [b, R, i, k]."""
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).reshape(*left.shape[:3], right.shape[3])


def gather_outer(keys: Tensor, weight: Tensor, right: Tensor) -> Tensor:
    """K^T diag(weight) right, [b, C, D], [b, R, C] and [b, C, V] -> [b, R, D, V]."""
    b, R, C = weight.shape
    weighted = keys.unsqueeze(2) * weight.transpose(1, 2).contiguous().unsqueeze(-1)
    return torch.bmm(weighted.reshape(b, C, -1).transpose(1, 2), right).reshape(b, R, -1, right.shape[2])


def decay_mask(g: Tensor) -> tuple[Tensor, Tensor]:
    """M [..., C, C] and zeta [..., C] from g [..., C].

    Each exponent is a sum of its own, not a difference of two long sums: nothing cancels, and e^{-G} is
    never formed.
    """
    C = g.shape[-1]
    inside = torch.ones(C, C, dtype=torch.bool, device=g.device).tril()
    after = inside.tril(-1)
    exponents = torch.where(after, g.unsqueeze(-1), g.new_zeros(())).cumsum(-2)
    return torch.where(inside, exponents.exp(), g.new_zeros(())), g.cumsum(-1).exp()


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x / (||x||_2 + 1e-6) over the last dim, with ||x||_2 and the divisor (paper, figure 2)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    divisor = norm + 1e-6
    return x / divisor, norm, divisor


def smooth_unit_rows(x: Tensor) -> Tensor:
    """x / (||x||_2 + 1e-6), as `unit_rows`, with derivatives of any order at x = 0 too."""
    return x / (root(x.square().sum(-1, keepdim=True)) + 1e-6)


def unit_rows_backward(d_unit: Tensor, unit: Tensor, norm: Tensor, divisor: Tensor) -> Tensor:
    """Gradient of `unit_rows` at x; where x = 0 only the divisor remains."""
    inner = (unit * d_unit).sum(-1, keepdim=True)
    return d_unit / divisor - unit * torch.where(norm > 0, inner / norm, torch.zeros_like(norm))


@dataclass
class Chunks:
    """What a block of chunks has before any state is known.

    K [b, C, D]; Vv [b, C, V]; weight = beta^2 [b, R, C], 0 at padding; M, Mb [b, R, C, C]; zeta [b, R, C].
    """

    K: Tensor
    Vv: Tensor
    weight: Tensor
    M: Tensor
    Mb: Tensor
    zeta: Tensor

    @classmethod
    def build(cls, K: Tensor, Vv: Tensor, g: Tensor, weight: Tensor) -> Chunks:
        M, zeta = decay_mask(g)
        return cls(K, Vv, weight, M, M * weight.unsqueeze(-2), zeta)

    @property
    def to_end(self) -> Tensor:
        """Decay from each token to the chunk's end, [b, R, C]."""
        return self.M[..., -1, :]

    def increment(self, right: Tensor) -> Tensor:
        """What the chunk adds to a state: K^T diag(Mb_C) right, right = K or V -> [b, R, D, .]."""
        return gather_outer(self.K, self.Mb[..., -1, :], right)


def squared_norm(chunks: Chunks, S_0: Tensor, KS: Tensor) -> Tensor:
    """||S_c||_F^2, [b, R, C], up to rounding; KS [b, R, C, D] = K S_0."""
    K, Mb, zeta = chunks.K, chunks.Mb, chunks.zeta
    quadratic = (KS * K.unsqueeze(1)).sum(-1)
    gram_squared = torch.bmm(K, K.transpose(1, 2)).square()
    return (
        zeta.square() * S_0.square().sum((-1, -2)).unsqueeze(-1)
        + 2.0 * zeta * (Mb @ quadratic.unsqueeze(-1)).squeeze(-1)
        + (mix(Mb, gram_squared) * Mb).sum(-1)
    )


class StateProduct(Product):
    """X [b, R, C, D] -> X S_hat: row c times S_c / ||S_c||_F, products and result in `dtype`."""

    def __init__(
        self, K: Tensor, S_0: Tensor, Mb: Tensor, zeta: Tensor, inverse_norm: Tensor, dtype: torch.dtype
    ) -> None:
        self.K, self.S_0 = K.to(dtype), S_0.to(dtype).flatten(0, 1)
        self.mask = (Mb * inverse_norm.unsqueeze(-1)).to(dtype)
        self.factor = (zeta * inverse_norm).unsqueeze(-1).to(dtype)

    def _scores(self, X: Tensor) -> Tensor:
        """The masked X K^T, [b, R C, C]."""
        return cross(X, self.K).mul_(self.mask).flatten(1, 2)

    def __call__(self, X: Tensor) -> Tensor:
        X = X.to(self.K.dtype)
        scores = self._scores(X)
        from_state = torch.bmm(X.flatten(0, 1), self.S_0).view(X.shape).mul_(self.factor)
        return from_state.view(*scores.shape[:2], -1).baddbmm_(scores, self.K).view(X.shape)

    def step(self, x: Tensor, kept: float, tau: float) -> Tensor:
        if x.dtype != self.K.dtype:
            return super().step(x, kept, tau)
        x = x.contiguous()
        scores, decayed = self._scores(x), (x * self.factor).flatten(0, 1)
        x.view(*scores.shape[:2], -1).baddbmm_(scores, self.K, beta=kept, alpha=-tau)
        x.view(decayed.shape).baddbmm_(decayed, self.S_0, alpha=-tau)
        return x


@dataclass
class Systems:
    """The ridge systems of a block's tokens, divided by their norms.

    S_0 [b, R, D, D]; KS [b, R, C, D] = K S_0; norm = max(||S_c||_F, NORM_FLOOR), inverse_norm [b, R, C] (0 for 0).
    """

    chunks: Chunks
    S_0: Tensor
    KS: Tensor
    norm: Tensor
    inverse_norm: Tensor
    ridge_ratio: float
    plan: Plan
    product_dtype: torch.dtype

    @classmethod
    def build(
        cls,
        chunks: Chunks,
        S_0: Tensor,
        ridge_ratio: float,
        plan: Plan,
        product_dtype: torch.dtype,
    ) -> Systems:
        KS = torch.matmul(chunks.K.unsqueeze(1), S_0)
        norm = floored(squared_norm(chunks, S_0, KS).clamp_min_(0.0).sqrt_())
        return cls(chunks, S_0, KS, norm, inverse_or_zero(norm), ridge_ratio, plan, product_dtype)

    def matvec(self, dtype: torch.dtype) -> Matvec:
        """X [b, R, C, D] -> X S_hat, with products in `dtype`, which is that of the result."""
        chunks = self.chunks
        return StateProduct(chunks.K, self.S_0, chunks.Mb, chunks.zeta, self.inverse_norm, dtype)

    def solve(self, Q: Tensor, counts: list[Tensor] | None = None) -> Tensor:
        """X [b, R, C, D] with X_c = (S_c + lambda_c I)^{-1} Q_c; 0 where S_c = 0.

        counts: gets the number of products of every chunk for each stage, [b, R, 1, 1], of conjugate gradient.
        """
        exact = self.matvec(Q.dtype)
        narrow = exact if self.product_dtype == Q.dtype else self.matvec(self.product_dtype)
        rhs = Q * self.inverse_norm.unsqueeze(-1)
        return self.plan.solve(
            narrow, rhs, self.ridge_ratio, residual_matvec=exact, product_dtype=self.product_dtype, counts=counts
        )

    def inner_zAx(self, Z: Tensor, X: Tensor) -> Tensor:
        """z_c^T (S_c + lambda_c I) x_c, [b, R, C]; without lambda_c where it does not follow S_c, at the floor."""
        ridge = self.ridge_ratio * (self.norm > NORM_FLOOR).to(X.dtype).unsqueeze(-1)
        product = self.matvec(X.dtype)(X) + ridge * X
        return (Z * product).sum(-1) * self.norm


def readout(chunks: Chunks, S_kv_0: Tensor, Y: Tensor) -> Tensor:
    """O / scale, [b, R, C, V]."""
    from_state = heads(Y, S_kv_0) * chunks.zeta.unsqueeze(-1)
    return from_state + mix(cross(Y, chunks.K) * chunks.Mb, chunks.Vv)


def readout_adjoint(chunks: Chunks, S_kv_0: Tensor, dO: Tensor) -> Tensor:
    """dY / scale, [b, R, C, D]."""
    from_state = heads(dO, S_kv_0.transpose(-1, -2)) * chunks.zeta.unsqueeze(-1)
    return from_state + mix(cross(dO, chunks.Vv) * chunks.Mb, chunks.K)


@dataclass
class SolveAdjoint:
    """The part of the backward pass that runs through S_kk (module docstring of `chunked`).

    X, Z [b, R, C, D]: solutions of the forward and the adjoint systems. With them come w = a <z, x> / ||S||, which
    is 0 where the norm is at its floor, and
    sum_M_w_zeta_j = sum_c M_{c,j} w_c zeta_c, [b, R, C].
    """

    systems: Systems
    X: Tensor
    Z: Tensor

    def __post_init__(self) -> None:
        systems, chunks = self.systems, self.systems.chunks
        inner = (self.Z * self.X).sum(-1)
        self.w = systems.ridge_ratio * inner * inverse_or_zero(systems.norm, NORM_FLOOR)
        w_zeta = (self.w * chunks.zeta).unsqueeze(-2)
        self.sum_M_w_zeta = (w_zeta @ chunks.M).squeeze(-2)
        self.zeta = chunks.zeta.unsqueeze(-1)

    def carry(self) -> Tensor:
        """What the chunk adds to the gradient of its first S_kk, [b, R, D, D]."""
        chunks = self.systems.chunks
        outer = heads((self.zeta * self.Z).transpose(-1, -2), self.X)
        ridge_keys = gather_outer(chunks.K, self.sum_M_w_zeta * chunks.weight, chunks.K)
        sum_w_zeta2 = (self.w * chunks.zeta.square()).sum(-1)[..., None, None]
        return -0.5 * (outer + outer.transpose(-1, -2)) - sum_w_zeta2 * self.systems.S_0 - ridge_keys

    def keys(self, G_plus: Tensor) -> tuple[Tensor, Tensor]:
        """2 G_i k_i for every token, [b, R, C, D]; G_plus [b, R, D, D] is the gradient at the chunk's end.

        In two parts: of the chunk's tokens, and of G_plus.
        """
        chunks = self.systems.chunks
        K, M = chunks.K, chunks.M
        local = heads((cross(self.Z, K) * M).transpose(-1, -2), self.X)
        local += heads((cross(self.X, K) * M).transpose(-1, -2), self.Z)
        weighted_gram = heads((M * self.w.unsqueeze(-1)).transpose(-1, -2), chunks.Mb)
        weighted_gram *= torch.bmm(K, K.transpose(1, 2)).unsqueeze(1)
        ridge_keys = self.sum_M_w_zeta.unsqueeze(-1) * self.systems.KS + mix(weighted_gram, K)
        from_end = torch.matmul(K.unsqueeze(1), G_plus) * (2.0 * chunks.to_end.unsqueeze(-1))
        return -2.0 * ridge_keys - local, from_end


@dataclass
class ReadoutAdjoint:
    """The part of the backward pass that runs through S_kv.

    Y [b, R, C, D]; dO [b, R, C, V], already multiplied by scale.
    """

    chunks: Chunks
    Y: Tensor
    dO: Tensor

    def carry(self) -> Tensor:
        """What the chunk adds to the gradient of its first S_kv, [b, R, D, V]."""
        return heads((self.chunks.zeta.unsqueeze(-1) * self.Y).transpose(-1, -2), self.dO)

    def keys(self, W_plus: Tensor) -> Tensor:
        """W_i v_i for every token, [b, R, C, D]; W_plus [b, R, D, V] is the gradient at the chunk's end."""
        chunks = self.chunks
        local = heads((cross(self.dO, chunks.Vv) * chunks.M).transpose(-1, -2), self.Y)
        from_end = torch.matmul(chunks.Vv.unsqueeze(1), W_plus.transpose(-1, -2))
        return local + from_end * chunks.to_end.unsqueeze(-1)

    def values(self, W_plus: Tensor) -> tuple[Tensor, Tensor]:
        """W_i^T k_i for every token, [b, R, C, V], in two parts: of the chunk's tokens, and of W_plus."""
        chunks = self.chunks
        local = heads((cross(self.Y, chunks.K) * chunks.M).transpose(-1, -2), self.dO)
        return local, torch.matmul(chunks.K.unsqueeze(1), W_plus) * chunks.to_end.unsqueeze(-1)
