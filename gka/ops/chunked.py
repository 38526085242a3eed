"""The op chunk by chunk in PyTorch, on any device, with a backward pass of its own.

Forward (paper, section 4.2): per block of chunks, scan the states, solve the systems, read out; see
`chunk_math`. Only x = A^{-1} q is kept, no iterate.

Backward, by implicit differentiation (paper, section 4.3). With G (for S_kk, symmetric) and W (for S_kv)
the gradients of the states, carried backwards in time:

    dy = scale S_kv do      dalpha = <x - q, dy>      z = A^{-1}(alpha dy)      dq = (1 - alpha) dy + z
    G += -(z x^T + x z^T) / 2 - a <z, x> / ||S_kk||_F S_kk                      W += scale y do^T
    dk = beta^2 (2 G k + W v)      dv = beta^2 W^T k      dbeta = beta (<2 G k + W v, k> + <W^T k, v>)
    then G <- e^{g} G,  W <- e^{g} W

The gate's gradient is a reverse cumulative sum inside each chunk, started from the chunk's last state:

    dg_t = sum_{s >= t in chunk} (<y, dy> - beta^2 <W^T k, v> - <z, A x> - beta^2 <2 G k, k> / 2)_s
           + <G_+, S_kk> + <W_+, S_kv>     with the gradients and states at the chunk's end

<z, A x> stands for <z, q>: they differ by the solver's truncation, and this one is exact for the gradient
defined above.

The states of a block are computed anew in the backward pass from those of the block's first tokens.

Legend: B batch, T time, H query heads, Hk key/value heads, R = H / Hk, D key dim, V value dim, N sequences,
C tokens per chunk, b chunks of a block times Hk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .chunk_math import ReadoutAdjoint, SolveAdjoint, readout, readout_adjoint, unit_rows, unit_rows_backward
from .problem import Problem
from .schedule import Block
from .types import State


def default_chunk_size(device: torch.device) -> int:
    """Tokens per chunk that were fastest: larger chunks cost more products, smaller ones more scanning."""
    return 32 if device.type == "cpu" else 64


def gated_kalmanet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    *,
    ridge_ratio: float,
    steps: tuple[int, ...],
    scale: float,
    initial_state: State | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    normalize_qk: bool,
) -> tuple[Tensor, State | None]:
    """The chunk-wise backend of `gka.ops.gated_kalmanet`, whose checked arguments it takes."""
    inputs = (q, k, v, g, alpha, beta)
    states = (None, None) if initial_state is None else (initial_state.S_kk, initial_state.S_kv)
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (*inputs, *states)
    )
    o, S_kk, S_kv, _ = _forward(
        *inputs,
        *states,
        cu_seqlens,
        ridge_ratio,
        list(steps),
        scale,
        chunk_size or default_chunk_size(q.device),
        normalize_qk,
        output_final_state,
        differentiable,
    )
    if not output_final_state:
        return o, None
    return o, State(S_kk if steps else None, S_kv)


def _no_tensor(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(0, dtype=dtype or like.dtype)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with autocast off: dtypes are chosen here, whatever surrounds the call."""

    @functools.wraps(function)
    def call(q: Tensor, *others: Any) -> Any:
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *others)

    return call


@torch.library.custom_op("gka::chunked_forward", mutates_args=())
@_without_autocast
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    S_kk: Tensor | None,
    S_kv: Tensor | None,
    cu_seqlens: Tensor | None,
    ridge_ratio: float,
    steps: Sequence[int],
    scale: float,
    chunk_size: int,
    normalize_qk: bool,
    output_final_state: bool,
    save_solution: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = Problem(
        q,
        k,
        v,
        g,
        alpha,
        beta,
        S_kk,
        S_kv,
        cu_seqlens,
        ridge_ratio,
        tuple(steps),
        scale,
        chunk_size,
        normalize_qk,
    )
    o = q.new_empty(p.tokens + 1, p.H, p.V)
    x = p.target(q, p.dtype) if save_solution and steps else _no_tensor(q, p.dtype)
    final_kk, final_kv = _no_tensor(q, p.dtype), _no_tensor(q, p.dtype)
    if output_final_state:
        final_kv = q.new_empty(len(p.bounds), p.H, p.D, p.V, dtype=p.dtype)
        if steps:
            final_kk = q.new_empty(len(p.bounds), p.H, p.D, p.D, dtype=p.dtype)
    for group in p.groups:
        carry = p.carries(group)
        for block in group.blocks:
            index = p.index(block)
            chunks, _ = p.chunks(index)
            first_kk, first_kv = p.states(block, chunks, carry)
            Y = p.read(q, index)
            if normalize_qk:
                Y = unit_rows(Y)[0]
            if steps:
                X = p.systems(chunks, first_kk).solve(Y)
                if save_solution:
                    p.write(x, index, X)
                Y, _ = p.blend(Y, X, index)
            p.write(o, index, readout(chunks, first_kv, Y).mul_(scale))
        if output_final_state:
            numbers = p.sequences(group)
            final_kv.index_copy_(0, numbers, carry[1])
            if steps:
                final_kk.index_copy_(0, numbers, carry[0])
    x = p.finish(x, q) if x.numel() else x
    return p.finish(o, q), final_kk, final_kv, x


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cu_seqlens, _, steps, *_, output_final_state, save_solution = others[5:]
    B, T, H, D = q.shape
    V = v.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    final_kv = q.new_empty((N, H, D, V) if output_final_state else (0,), dtype=dtype)
    final_kk = q.new_empty((N, H, D, D) if output_final_state and steps else (0,), dtype=dtype)
    x = q.new_empty((B, T, H, D) if save_solution and steps else (0,), dtype=dtype)
    return q.new_empty(B, T, H, V), final_kk, final_kv, x


@torch.library.custom_op("gka::chunked_backward", mutates_args=())
@_without_autocast
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    S_kk: Tensor | None,
    S_kv: Tensor | None,
    cu_seqlens: Tensor | None,
    x: Tensor,
    do: Tensor,
    dS_kk: Tensor | None,
    dS_kv: Tensor | None,
    ridge_ratio: float,
    steps: Sequence[int],
    scale: float,
    chunk_size: int,
    normalize_qk: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    p = Problem(
        q,
        k,
        v,
        g,
        alpha,
        beta,
        S_kk,
        S_kv,
        cu_seqlens,
        ridge_ratio,
        tuple(steps),
        scale,
        chunk_size,
        normalize_qk,
    )
    dq, dk, dv, dg = (p.target(tensor) for tensor in (q, k, v, g))
    dalpha = _no_tensor(q) if alpha is None else p.target(alpha)
    dbeta = _no_tensor(q) if beta is None else p.target(beta)
    dS_kk_0 = _no_tensor(q) if S_kk is None else torch.empty_like(S_kk)
    dS_kv_0 = _no_tensor(q) if S_kv is None else torch.empty_like(S_kv)
    for group in p.groups:
        carry, saved = p.carries(group), []
        for block in group.blocks:
            saved.append(tuple(tensor.clone() for tensor in carry))
            p.states(block, p.chunks(p.index(block))[0], carry)
        numbers = p.sequences(group)
        W = p.first_state(dS_kv, p.V, numbers)
        G = p.first_state(dS_kk, p.D, numbers) if steps else W[..., :0]
        if steps:
            G = 0.5 * (G + G.transpose(-1, -2))
        for block in reversed(group.blocks):
            first, index = saved.pop(), p.index(block)
            grads = _block_backward(p, block, index, (first[0], first[1]), (G, W), x, do)
            for target, rows in zip((dq, dk, dv, dg, dalpha, dbeta), grads, strict=True):
                if rows is not None:
                    p.write(target, index, rows)
        if S_kv is not None:
            dS_kv_0.index_copy_(0, numbers, W.to(S_kv.dtype))
        if S_kk is not None:
            dS_kk_0.index_copy_(0, numbers, G.to(S_kk.dtype) if steps else torch.zeros_like(S_kk)[numbers])
    finished = [p.finish(t, like) for t, like in ((dq, q), (dk, k), (dv, v), (dg, g))]
    if alpha is not None:
        dalpha = p.finish(dalpha, alpha)
    if beta is not None:
        dbeta = p.finish(dbeta, beta)
    return finished[0], finished[1], finished[2], finished[3], dalpha, dbeta, dS_kk_0, dS_kv_0


def _block_backward(
    p: Problem,
    block: Block,
    index: Tensor,
    first: tuple[Tensor, Tensor],
    future: tuple[Tensor, Tensor],
    x: Tensor,
    do: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of a block's q, k, v, g, alpha, beta, as rows for `Problem.write`.

    first: states at the block's start, consumed; future: G and W at its end, moved to its start.
    """
    G, W = future
    chunks, key_norms = p.chunks(index)
    S_kk, S_kv = p.states(block, chunks, first)
    decay = chunks.zeta[..., -1]
    Q = p.read(p.q, index)
    if p.normalize_qk:
        Q, *query_norms = unit_rows(Q)
    real = (index < p.tokens).view(-1, 1, 1, p.chunk_size, 1).expand(-1, p.Hk, -1, -1, -1).flatten(0, 1)
    dO = p.read(do, index) * (p.scale * real.to(p.dtype))
    dY = readout_adjoint(chunks, S_kv, dO)
    X, Y, alpha = Q, Q, None
    if p.steps:
        X = p.read(x, index)
        Y, alpha = p.blend(Q, X, index)
    through_readout = ReadoutAdjoint(chunks, Y, dO)
    W_plus = p.scan(block, decay, through_readout.carry(), W, reverse=True)
    dk = through_readout.keys(W_plus)
    dv = through_readout.values(W_plus)
    written = (dv * chunks.Vv.unsqueeze(1)).sum(-1)
    dg = (Y * dY).sum(-1) - chunks.weight * written
    end_kv = decay[..., None, None] * S_kv + chunks.increment(chunks.Vv)
    at_end = (W_plus * end_kv).sum((-1, -2))
    dQ, dalpha = dY, None
    if p.steps:
        systems = p.systems(chunks, S_kk)
        if alpha is None:
            dQ = Z = systems.solve(dY)
        else:
            dalpha = ((X - Q) * dY).sum(-1)
            Z = systems.solve(alpha * dY)
            dQ = torch.addcmul(dY + Z, alpha, dY, value=-1.0)
        through_solve = SolveAdjoint(systems, X, Z)
        G_plus = p.scan(block, decay, through_solve.carry(), G, reverse=True)
        through_keys = through_solve.keys(G_plus)
        end_kk = decay[..., None, None] * S_kk + chunks.increment(chunks.K)
        at_end = at_end + (G_plus * end_kk).sum((-1, -2))
        squeezed = (through_keys * chunks.K.unsqueeze(1)).sum(-1)
        dg = dg - systems.energy(Z, X) - 0.5 * chunks.weight * squeezed
        dk = dk + through_keys
    elif p.alpha is not None:
        dalpha = torch.zeros_like(dg)
    dg = dg.flip(-1).cumsum(-1).flip(-1) + at_end.unsqueeze(-1)
    dbeta = None
    if p.beta is not None:
        dbeta = p.read(p.beta, index) * ((dk * chunks.K.unsqueeze(1)).sum(-1) + written)
    weight = chunks.weight.unsqueeze(-1)
    dK, dV = (weight * dk).sum(1, keepdim=True), (weight * dv).sum(1, keepdim=True)
    if p.normalize_qk:
        dQ = unit_rows_backward(dQ, Q, query_norms[0], query_norms[1])
        assert key_norms is not None
        norms = [tensor.unsqueeze(1) for tensor in (chunks.K, *key_norms)]
        dK = unit_rows_backward(dK, norms[0], norms[1], norms[2])
    return dQ, dK, dV, dg, dalpha, dbeta


@_backward.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, ...]:
    inputs = (q, *others[:7])
    return tuple(q.new_empty(0) if x is None else torch.empty_like(x).contiguous() for x in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:9], output[3])
    ctx.options = inputs[9:14]
    ctx.set_materialize_grads(False)
    ctx.output_like = (output[0].shape, output[0].dtype, output[0].device)


def _autograd_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    do, dS_kk, dS_kv, _ = gradients
    *inputs, x = ctx.saved_tensors
    if do is None:
        shape, dtype, device = ctx.output_like
        do = torch.zeros(shape, dtype=dtype, device=device)
    if dS_kk is not None and dS_kk.numel() == 0:
        dS_kk = None
    grads = _backward(*inputs, x, do, dS_kk, dS_kv, *ctx.options)
    found = [None if tensor is None else grad for tensor, grad in zip(inputs, grads, strict=False)]
    return *found, *([None] * 8)


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
