"""One token in PyTorch: the form for decoding (paper, section 4.1).

    S_kk <- e^g S_kk + beta^2 k k^T        S_kv <- e^g S_kv + beta^2 k v^T
    x = (S_kk + a ||S_kk||_F I)^{-1} q     o = scale * (q + alpha (x - q))^T S_kv

Legend: B sequences, H query heads, Hk key/value heads, D key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..autocast import autocast_off
from ..pool import gather_rows, scatter_states_
from ..solvers import ridge_solution, ridge_solve
from ..transforms import transforms_active
from ..types import Arguments, State, repeat_heads
from .chunk_math import smooth_unit_rows, unit_rows


def gated_kalmanet_step(
    arguments: Arguments, *, inplace: bool, state_indices: Tensor | None = None
) -> tuple[Tensor, State]:
    """The PyTorch backend of `gka.ops.gated_kalmanet_step`, whose checked arguments it takes.

    The arithmetic is in the states' dtype, or in float32 for bfloat16 states; derivatives, of any kind, are those
    of PyTorch and of `ridge_solve`.
    """
    if state_indices is not None:
        return _step_of_pool(arguments, state_indices)
    with autocast_off(arguments.q.device):
        o, (S_kk, S_kv) = _step(arguments, inplace)
    old_kk, old_kv = arguments.S_kk, arguments.S_kv
    assert old_kv is not None
    if not inplace:
        return o, State(None if S_kk is None else S_kk.to(old_kv.dtype), S_kv.to(old_kv.dtype))
    if S_kv.dtype != old_kv.dtype:
        old_kv.copy_(S_kv)
        if S_kk is not None and old_kk is not None:
            old_kk.copy_(S_kk)
    return o, State(old_kk, old_kv)


def _step_of_pool(arguments: Arguments, state_indices: Tensor) -> tuple[Tensor, State]:
    """The step on copies of the rows, which are written back."""
    assert arguments.S_kv is not None
    pool = State(arguments.S_kk, arguments.S_kv)
    S_kk, S_kv = (None if part is None else gather_rows(part, state_indices) for part in pool)
    o, new = gated_kalmanet_step(arguments._replace(S_kk=S_kk, S_kv=S_kv), inplace=True)
    scatter_states_(pool, state_indices, new)
    return torch.where((state_indices >= 0)[:, None, None], o, torch.zeros_like(o)), pool


def _step(a: Arguments, inplace: bool) -> tuple[Tensor, State]:
    """o and the new states in the dtype of the arithmetic; `inplace`: in the place of old states of that dtype."""
    assert a.S_kv is not None
    heads, dtype = a.q.shape[1], torch.promote_types(a.S_kv.dtype, torch.float32)
    differentiated = a.needs_gradient() or transforms_active()
    query, keys, values = a.q.to(dtype), a.k.to(dtype), a.v.to(dtype)
    if a.normalize_qk:
        if differentiated:
            query, keys = smooth_unit_rows(query), smooth_unit_rows(keys)
        else:
            query, keys = unit_rows(query)[0], unit_rows(keys)[0]
    keys, values = repeat_heads(keys, heads, dim=1), repeat_heads(values, heads, dim=1)
    weighted = keys if a.beta is None else keys * a.beta.to(dtype).square().unsqueeze(-1)
    kept, rate = _decay_parts(a.g.to(dtype))
    S_kv = _updated(a.S_kv.to(dtype), kept, rate, weighted, values, inplace)
    S_kk: Tensor | None = None
    y = query
    if a.solver_steps:
        assert a.S_kk is not None
        S_kk = a.S_kk.to(dtype)
        if differentiated:  # changes no value of a symmetric S_kk, and makes its derivatives symmetric
            S_kk = 0.5 * (S_kk + S_kk.transpose(-1, -2))
        S_kk = _updated(S_kk, kept, rate, weighted, keys, inplace)
        solve = ridge_solve if differentiated else ridge_solution
        x = solve(S_kk, query, a.ridge_ratio, a.plan.dense())
        y = x if a.alpha is None else torch.lerp(query, x, a.alpha.to(dtype).unsqueeze(-1))
    o = a.scale * (y.unsqueeze(-2) @ S_kv).squeeze(-2)
    return o.to(a.q.dtype), State(S_kk, S_kv)


def _decay_parts(g: Tensor) -> tuple[Tensor, Tensor]:
    """(kept, rate), [B, H, 1, 1] each: e^g S = kept S + rate S; for small g, kept is 1 and rate e^g - 1.

    e^g alone would be rounded, for a constant g the same way at every token, and that adds up over the 1 / |g|
    tokens that a state remembers: to 3e-8 / |g| of it in float32.
    """
    near = g > -0.25  # no global: it would be an input of a compiled graph
    rate = torch.where(near, torch.expm1(g), g.exp())
    return near.to(g.dtype)[..., None, None], rate[..., None, None]


def _updated(S: Tensor, kept: Tensor, rate: Tensor, weighted: Tensor, row: Tensor, inplace: bool) -> Tensor:
    """(kept + rate) S + weighted row^T, over S if `inplace`; S [B, H, D, D or V], weighted, row [B, H, D or V].

    What is small is summed first, so that one rounding has the size of S. Two add up over the tokens: for a slow
    decay of a state at rest the first is alike at every token.
    """
    change = torch.addcmul(weighted.unsqueeze(-1) * row.unsqueeze(-2), rate, S)
    updated = torch.addcmul(change, kept, S)
    return S.copy_(updated) if inplace else updated
