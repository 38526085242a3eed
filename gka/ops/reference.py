"""The reference: two independent computations, one token at a time, in float64.

`gated_kalmanet` is the definition of the layer (paper, section 4.1), for every token t:

    S_kk <- e^{g_t} S_kk + beta_t^2 k_t k_t^T        S_kv <- e^{g_t} S_kv + beta_t^2 k_t v_t^T
    x_t = (S_kk + a ||S_kk||_F I)^{-1} q_t           y_t = q_t + alpha_t (x_t - q_t)
    o_t = scale * y_t^T S_kv

`kalman_filter` is the classical recursion (paper, equation KF and section 6): gain and covariance by
Woodbury's identity, with initial covariance I / lambda. It gives the same regression W_t = (S_kk + lambda_t
I)^{-1} S_kv as `ridge_regression` if lambda decays with the data, lambda_t = lambda e^{g_1 + ... + g_t}.

Legend: B batch, T time, H query heads, Hk key/value heads, D key dim, V value dim, N sequences.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .solvers import Chebyshev, Exact, Solver, ridge_solve
from .types import Arguments, Outputs, Saved, State, repeat_heads, state_dtype


def gated_kalmanet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    *,
    ridge_ratio: float,
    solver_steps: tuple[int, ...] | None,
    scale: float,
    initial_state: State | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    normalize_qk: bool,
    solver: Solver | None = None,
) -> tuple[Tensor, State | None]:
    """The definition, always in float64, with gradients by autograd and `ridge_solve`.

    The arguments are those of `gka.ops.gated_kalmanet`, already checked, and `solver`. None means Chebyshev
    nodes with `solver_steps`, or the exact solve if `solver_steps` is None too.

    Returns:
        o [B, T, H, V] float64, and the final state in float64.
    """
    solver = solver or (Exact() if solver_steps is None else Chebyshev(solver_steps))
    solve = solver_steps != ()
    heads = q.shape[2]
    q, k, v, g = (tensor.double() for tensor in (q, k, v, g))
    if normalize_qk:
        q = q / (torch.linalg.vector_norm(q, dim=-1, keepdim=True) + 1e-6)
        k = k / (torch.linalg.vector_norm(k, dim=-1, keepdim=True) + 1e-6)
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    if beta is not None:
        k, v = k * beta.double().unsqueeze(-1), v * beta.double().unsqueeze(-1)

    batch, length, _, key_dim = q.shape
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    sequences = batch if cu_seqlens is None else len(bounds) - 1
    if initial_state is None:
        S_kk_all = q.new_zeros(sequences, heads, key_dim, key_dim)
        S_kv_all = q.new_zeros(sequences, heads, key_dim, v.shape[-1])
    else:
        S_kv_all = initial_state.S_kv.double()
        S_kk_all = q.new_zeros(sequences, heads, key_dim, key_dim)
        if initial_state.S_kk is not None:
            S_kk_all = initial_state.S_kk.double()
            S_kk_all = 0.5 * (S_kk_all + S_kk_all.transpose(-1, -2))

    outputs: list[Tensor] = []
    finals: list[tuple[Tensor, Tensor]] = []
    for start, end in pairwise(bounds):
        rows = slice(len(finals), len(finals) + 1) if cu_seqlens is not None else slice(None)
        S_kk, S_kv = S_kk_all[rows], S_kv_all[rows]
        for t in range(start, end):
            decay = g[:, t].exp()[..., None, None]
            S_kk = decay * S_kk + k[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
            S_kv = decay * S_kv + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            y = q[:, t]
            if solve:
                x = ridge_solve(S_kk, q[:, t], ridge_ratio, solver)
                y = x if alpha is None else y + alpha[:, t].double().unsqueeze(-1) * (x - y)
            outputs.append(scale * (y.unsqueeze(-2) @ S_kv).squeeze(-2))
        finals.append((S_kk, S_kv))

    o = torch.stack(outputs, dim=1) if outputs else q.new_zeros(batch, 0, heads, v.shape[-1])
    if not output_final_state:
        return o, None
    S_kk_final = torch.cat([S_kk for S_kk, _ in finals]) if finals else S_kk_all
    S_kv_final = torch.cat([S_kv for _, S_kv in finals]) if finals else S_kv_all
    return o, State(S_kk_final if solve else None, S_kv_final)


def forward(arguments: Arguments, *, output_final_state: bool, save: bool) -> Outputs:
    """`gated_kalmanet` as a backend: o in the dtype of q, the state in its state dtype. It saves nothing."""
    q, S_kk, S_kv = arguments.q, arguments.S_kk, arguments.S_kv
    o, final = gated_kalmanet(
        *arguments[:6],
        ridge_ratio=arguments.ridge_ratio,
        solver_steps=arguments.solver_steps,
        scale=arguments.scale,
        initial_state=None if S_kv is None else State(S_kk, S_kv),
        output_final_state=output_final_state,
        cu_seqlens=arguments.cu_seqlens,
        normalize_qk=arguments.normalize_qk,
        solver=arguments.plan.dense() if arguments.solver_steps else None,
    )
    final_kk, final_kv = (None, None) if final is None else final
    states = [None if S is None else S.to(state_dtype(q.dtype)) for S in (final_kk, final_kv)]
    return Outputs(o.to(q.dtype), states[0], states[1], Saved())


backward = None  # autograd differentiates `forward`


def empty_saved(arguments: Arguments) -> Saved:
    return Saved()


def default_chunk_size(device: torch.device) -> int:
    return 0


def ridge_regression(k: Tensor, v: Tensor, g: Tensor, ridge: Tensor | float) -> Tensor:
    """W_t = (S_kk_t + ridge_t I)^{-1} S_kv_t, with a separate solve for each token.

    Args:
        k: [B, T, H, D]; v: [B, T, H, V]; g: [B, T, H], log-decay <= 0; all of one floating dtype.
        ridge: lambda_t, [B, T, H], or one number for all tokens; greater than 0.

    Returns:
        W [B, T, H, D, V], dtype of k.
    """
    S_kk = k.new_zeros(*k.shape[:1], *k.shape[2:], k.shape[-1])
    S_kv = k.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1])
    ridges = torch.as_tensor(ridge, dtype=k.dtype, device=k.device).expand(g.shape)
    identity = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    estimates = []
    for t in range(k.shape[1]):
        decay = g[:, t].exp()[..., None, None]
        S_kk = decay * S_kk + k[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
        S_kv = decay * S_kv + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        estimates.append(torch.linalg.solve(S_kk + ridges[:, t, :, None, None] * identity, S_kv))
    return torch.stack(estimates, dim=1)


def kalman_filter(k: Tensor, v: Tensor, g: Tensor, ridge: float) -> Tensor:
    """The same W_t by the classical recursion, for lambda_t = ridge * e^{g_1 + ... + g_t}.

        P <- P / e^{g_t};   gain = P k / (1 + k^T P k);   W <- W + gain (v - W^T k)^T;   P <- P - gain (P k)^T

    from P = I / ridge, W = 0. It runs in the dtype of the inputs. P is a difference of nearly equal numbers, so
    the recursion fails in 16 bits (paper, section 6).

    Args:
        k: [B, T, H, D]; v: [B, T, H, V]; g: [B, T, H], log-decay <= 0; all of one floating dtype.
        ridge: lambda > 0.

    Returns:
        W [B, T, H, D, V], dtype of k.
    """
    identity = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    P = (identity / ridge).expand(k.shape[0], k.shape[2], -1, -1)
    W = k.new_zeros(k.shape[0], k.shape[2], k.shape[-1], v.shape[-1])
    estimates = []
    for t in range(k.shape[1]):
        P = P / g[:, t].exp()[..., None, None]
        key = k[:, t].unsqueeze(-1)
        projected = P @ key
        gain = projected / (1 + key.transpose(-1, -2) @ projected)
        innovation = v[:, t].unsqueeze(-2) - key.transpose(-1, -2) @ W
        W = W + gain @ innovation
        P = P - gain @ projected.transpose(-1, -2)
        estimates.append(W)
    return torch.stack(estimates, dim=1)
