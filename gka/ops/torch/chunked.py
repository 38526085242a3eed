"""The op chunk by chunk in PyTorch, on any device, with a backward pass of its own.

Forward (paper, section 4.2): per block of chunks, scan the states, solve the systems, read out; see
`chunk_math`. Only x = A^{-1} q is kept, no iterate.

Backward, by implicit differentiation (paper, section 4.3). With G (for S_kk, symmetric) and W (for S_kv)
the gradients of the states, carried backwards in time:

    dy = scale S_kv do      dalpha = <x - q, dy>      z = A^{-1}(alpha dy)      dq = (1 - alpha) dy + z
    G += -(z x^T + x z^T) / 2 - a <z, x> / ||S_kk||_F S_kk                      W += scale y do^T
    dk = beta^2 (2 G k + W v)      dv = beta^2 W^T k      dbeta = beta (<2 G k + W v, k> + <W^T k, v>)
    then G <- e^{g} G,  W <- e^{g} W

A gate's gradient is what passes it, from earlier to later. f_s = beta^2 (<W^T k, v> + <2 G k, k> / 2)_s has two
parts: f' from the gradients G_+, W_+ at the chunk's end (what a key gives to the state there), and f'' from the
chunk's own tokens:

    dg_t = sum_{s >= t in chunk} (<y, dy> - <z, A x> - f'')_s + sum_{s < t in chunk} f'_s
           + zeta_C (<G_+, S_kk_0> + <W_+, S_kv_0>)     with the states at the chunk's start

No sum is taken from a larger one.

<z, A x> stands for <z, q>: they differ by the solver's truncation, and this one is exact for the gradient
defined above.

The states of a block are computed anew in the backward pass from those of the block's first tokens.

Legend: B batch, T time, H query heads, Hk key/value heads, R = H / Hk, D key dim, V value dim, N sequences,
C tokens per chunk, b chunks of a block times Hk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..types import Arguments, Gradients, Outputs, Saved, state_dtype
from .blocks import Block
from .chunk_math import ReadoutAdjoint, SolveAdjoint, readout, readout_adjoint, unit_rows, unit_rows_backward
from .chunked_inputs import ChunkedInputs, default_chunk_size

__all__ = ["backward", "default_chunk_size", "empty_saved", "forward"]


def forward(arguments: Arguments, *, output_final_state: bool, save: bool) -> Outputs:
    """The op; `save` keeps x for `backward`."""
    p, solver_steps, q = ChunkedInputs(arguments), arguments.solver_steps, arguments.q
    o = q.new_empty(p.tokens + 1, p.H, p.V)
    x = p.target(q, p.dtype) if save and solver_steps else None
    final_kk = final_kv = None
    if output_final_state:
        final_kv = q.new_empty(len(p.bounds), p.H, p.D, p.V, dtype=p.dtype)
        if solver_steps:
            final_kk = q.new_empty(len(p.bounds), p.H, p.D, p.D, dtype=p.dtype)
    for group in p.groups:
        carry = p.carries(group)
        for block in group.blocks:
            index, chunks, first_kk, first_kv, Y = p.inputs(block, carry)
            if solver_steps:
                X = p.systems(chunks, first_kk).solve(p.zero_at_padding(Y, index))
                if x is not None:
                    p.write(x, index, X)
                Y, _ = p.blend(Y, X, index)
            p.write(o, index, readout(chunks, first_kv, Y).mul_(p.scale))
        numbers = p.sequences(group)
        if final_kv is not None:
            final_kv.index_copy_(0, numbers, carry[1])
        if final_kk is not None:
            final_kk.index_copy_(0, numbers, carry[0])
    return Outputs(p.finish(o, q), final_kk, final_kv, Saved(None if x is None else p.finish(x, q)))


def empty_saved(arguments: Arguments) -> Saved:
    """What `forward` saves, uninitialised."""
    q = arguments.q
    return Saved(q.new_empty(q.shape, dtype=state_dtype(q.dtype)) if arguments.solver_steps else None)


def backward(
    arguments: Arguments,
    *,
    saved: Saved,
    final: tuple[Tensor, Tensor],
    do: Tensor,
    d_final: tuple[Tensor | None, Tensor | None],
) -> Gradients:
    """Gradients of the inputs from those of o and of the final states; `final` itself is not needed."""
    p, solver_steps, q, x = ChunkedInputs(arguments), arguments.solver_steps, arguments.q, saved.x
    dS_kk, dS_kv = d_final
    assert x is not None
    targets = [None if tensor is None else p.target(tensor) for tensor in arguments[:6]]
    dS_kk_0, dS_kv_0 = (None if t is None else t.new_empty(t.shape) for t in arguments[6:8])
    for group in p.groups:
        carry, firsts = p.carries(group), []
        for block in group.blocks:
            firsts.append(tuple(tensor.clone() for tensor in carry))
            p.states(block, p.chunks(p.index(block))[0], carry)
        numbers = p.sequences(group)
        W = p.first_state(dS_kv, p.V, numbers)
        G = p.first_state(dS_kk, p.D, numbers) if solver_steps else W[..., :0]
        if solver_steps:
            G = 0.5 * (G + G.transpose(-1, -2))
        for block in reversed(group.blocks):
            first, index = firsts.pop(), p.index(block)
            grads = _block_backward(p, block, index, (first[0], first[1]), (G, W), x, do)
            for target, rows in zip(targets, grads, strict=True):
                if target is not None and rows is not None:
                    p.write(target, index, rows)
        if dS_kv_0 is not None:
            dS_kv_0.index_copy_(0, numbers, W.to(dS_kv_0.dtype))
        if dS_kk_0 is not None:
            dS_kk_0.index_copy_(0, numbers, G.to(dS_kk_0.dtype))
    found: list[Any] = [None if t is None else p.finish(t, q) for t in targets]
    return Gradients(found[0], found[1], found[2], found[3], found[4], found[5], dS_kk_0, dS_kv_0)


def _block_backward(
    p: ChunkedInputs,
    block: Block,
    index: Tensor,
    first: tuple[Tensor, Tensor],
    d_state: tuple[Tensor, Tensor],
    x: Tensor,
    do: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of a block's q, k, v, g, alpha, beta, as rows for `ChunkedInputs.write`.

    first: states at the block's start, consumed; d_state: G and W at its end, moved to its start.
    """
    G, W = d_state
    chunks, key_norms = p.chunks(index)
    S_kk, S_kv = p.states(block, chunks, first)
    decay = chunks.zeta[..., -1]
    Q = p.read(p.q, index)
    if p.normalize_qk:
        Q, *query_norms = unit_rows(Q)
    dO = p.read(do, index) * (p.scale * p.real(index))
    dY = readout_adjoint(chunks, S_kv, dO)
    X, Y, alpha = Q, Q, None
    if p.solver_steps:
        X = p.read(x, index)
        Y, alpha = p.blend(Q, X, index)
    readout_part = ReadoutAdjoint(chunks, Y, dO)
    W_plus = p.scan(block, decay, readout_part.carry(), W, reverse=True)
    dk = readout_part.keys(W_plus)
    parts = readout_part.values(W_plus)
    dv = parts[0] + parts[1]
    sum_uv, sum_uv_end = ((part * chunks.Vv.unsqueeze(1)).sum(-1) for part in parts)
    sum_pk = sum_pk_end = inner_zAx = torch.zeros_like(sum_uv)
    inner_states = (W_plus * S_kv).sum((-1, -2))
    dQ, dalpha = dY, None
    if p.solver_steps:
        systems = p.systems(chunks, S_kk)
        if alpha is None:
            dQ = Z = systems.solve(dY)
        else:
            dalpha = ((X - Q) * dY).sum(-1)
            Z = systems.solve(alpha * dY)
            dQ = torch.addcmul(dY + Z, alpha, dY, value=-1.0)
        solve_part = SolveAdjoint(systems, X, Z)
        G_plus = p.scan(block, decay, solve_part.carry(), G, reverse=True)
        parts = solve_part.keys(G_plus)
        sum_pk, sum_pk_end = ((part * chunks.K.unsqueeze(1)).sum(-1) for part in parts)
        inner_zAx = systems.inner_zAx(Z, X)
        inner_states = inner_states + (G_plus * S_kk).sum((-1, -2))
        dk = dk + parts[0] + parts[1]
    elif p.alpha is not None:
        dalpha = torch.zeros_like(sum_uv)
    from_later = (Y * dY).sum(-1) - inner_zAx - chunks.weight * (sum_uv + 0.5 * sum_pk)
    from_earlier = chunks.weight * (sum_uv_end + 0.5 * sum_pk_end)
    dg = from_later.flip(-1).cumsum(-1).flip(-1) + from_earlier.cumsum(-1) - from_earlier
    dg = dg + (decay * inner_states).unsqueeze(-1)
    dbeta = None
    if p.beta is not None:
        dbeta = p.read(p.beta, index) * ((dk * chunks.K.unsqueeze(1)).sum(-1) + sum_uv + sum_uv_end)
    weight = chunks.weight.unsqueeze(-1)
    dK, dV = (weight * dk).sum(1, keepdim=True), (weight * dv).sum(1, keepdim=True)
    if p.normalize_qk:
        dQ = unit_rows_backward(dQ, Q, query_norms[0], query_norms[1])
        assert key_norms is not None
        norms = [tensor.unsqueeze(1) for tensor in (chunks.K, *key_norms)]
        dK = unit_rows_backward(dK, norms[0], norms[1], norms[2])
    return dQ, dK, dV, dg, dalpha, dbeta
