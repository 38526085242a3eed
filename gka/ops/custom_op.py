"""The op as custom operators of PyTorch, for autograd and torch.compile, for every backend.

torch.compile does not look into a custom operator; it traces shapes only. Autocast is off inside. An operator
takes a flat list of tensors and numbers. `_pack` makes this list from `Arguments`, `_unpack` makes `Arguments`
from the list; both follow the schemas of `_forward` and `_backward`.

Legend: B batch, T time, H query heads, Hk key/value heads, D key dim, V value dim, N sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import flops
from .autocast import autocast_off
from .backends import BACKENDS, warn_slow_derivatives
from .torch import differentiable
from .transforms import gradients_with_graph, must_dispatch
from .types import Arguments, Saved, State, state_dtype


def gated_kalmanet(arguments: Arguments, *, backend: str, output_final_state: bool) -> tuple[Tensor, State | None]:
    """Run `gka.ops.gated_kalmanet`, with checked arguments, in a backend of the table."""
    o: Tensor
    S_kk: Tensor | None
    S_kv: Any
    if BACKENDS[backend].by_autograd:
        computed = BACKENDS[backend].load().forward(arguments, output_final_state=output_final_state, save=False)
        o, S_kk, S_kv, _ = computed
    else:
        save = arguments.needs_gradient()
        call = _forward_operator if must_dispatch(arguments.q) else _Direct.apply if save else _forward
        o, S_kk, S_kv, *_ = call(*_pack(arguments, backend), output_final_state, save)
    if not output_final_state:
        return o, None
    return o, State(S_kk if arguments.solver_steps else None, S_kv)


TENSORS = 9  # the tensors of `Arguments`, first in a packed list


def _pack(arguments: Arguments, backend: str) -> tuple[Any, ...]:
    """Tensors and numbers in the order of the operator; chunk_size 0 means None."""
    return *arguments[:TENSORS], backend, *arguments.numbers, arguments.chunk_size or 0


def _unpack(
    tensors: Sequence[Tensor | None],
    backend: str,
    ridge_ratio: float,
    solver_steps: Sequence[int],
    scale: float,
    normalize_qk: bool,
    solver: str,
    tolerance: float | None,
    chunk_size: int,
) -> Arguments:
    """The inverse of `_pack`; a missing chunk size becomes the default of the device."""
    q: Any = tensors[0]
    C = chunk_size or BACKENDS[backend].load().default_chunk_size(q.device)
    return Arguments.of(tensors, ridge_ratio, solver_steps, scale, normalize_qk, solver, tolerance, C)


def _given(like: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """The tensors, with an empty tensor for None, because an operator must return tensors."""
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with autocast off, because this module chooses the dtypes."""

    @functools.wraps(function)
    def call(q: Tensor, *others: Any) -> Any:
        with autocast_off(q.device):
            return function(q, *others)

    return call


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
    backend: str,
    ridge_ratio: float,
    solver_steps: Sequence[int],
    scale: float,
    normalize_qk: bool,
    solver: str,
    tolerance: float | None,
    chunk_size: int,
    output_final_state: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the final S_kk and S_kv, and x, x_lo, norm, edge_kk, edge_kv of `Saved`; empty for None."""
    tensors = (q, k, v, g, alpha, beta, S_kk, S_kv, cu_seqlens)
    numbers = (ridge_ratio, solver_steps, scale, normalize_qk, solver, tolerance)
    arguments = _unpack(tensors, backend, *numbers, chunk_size)
    o, final_kk, final_kv, saved = (
        BACKENDS[backend].load().forward(arguments, output_final_state=output_final_state, save=save)
    )
    final_kk, final_kv, x, x_lo, norm, edge_kk, edge_kv = _given(q, final_kk, final_kv, *saved)
    return o, final_kk, final_kv, x, x_lo, norm, edge_kk, edge_kv


_forward_operator = torch.library.custom_op("gka::forward", _forward, mutates_args=())


@_forward_operator.register_fake
def _(*packed: Any) -> tuple[Tensor, ...]:
    backend, *numbers, output_final_state, save = packed[TENSORS:]
    arguments = _unpack(packed[:TENSORS], backend, *numbers)
    q, V, N = arguments.q, arguments.v.shape[3], arguments.sequences
    B, T, H, D = q.shape
    final_kk = final_kv = None
    if output_final_state:
        final_kv = q.new_empty(N, H, D, V, dtype=state_dtype(q.dtype))
        final_kk = q.new_empty(N, H, D, D, dtype=state_dtype(q.dtype)) if arguments.solver_steps else None
    saved = BACKENDS[backend].load().empty_saved(arguments) if save else Saved()
    return q.new_empty(B, T, H, V), *_given(q, final_kk, final_kv, *saved)


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
    final_kk: Tensor,
    final_kv: Tensor,
    x: Tensor,
    x_lo: Tensor,
    norm: Tensor,
    edge_kk: Tensor,
    edge_kv: Tensor,
    do: Tensor,
    dS_kk: Tensor | None,
    dS_kv: Tensor | None,
    backend: str,
    ridge_ratio: float,
    solver_steps: Sequence[int],
    scale: float,
    normalize_qk: bool,
    solver: str,
    tolerance: float | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Gradients`, empty for None."""
    tensors = (q, k, v, g, alpha, beta, S_kk, S_kv, cu_seqlens)
    numbers = (ridge_ratio, solver_steps, scale, normalize_qk, solver, tolerance)
    arguments = _unpack(tensors, backend, *numbers, chunk_size)
    backward = BACKENDS[backend].load().backward
    assert backward is not None
    saved = Saved(x, x_lo, norm, edge_kk, edge_kv)
    found = backward(arguments, saved=saved, final=(final_kk, final_kv), do=do, d_final=(dS_kk, dS_kv))
    dq, dk, dv, dg, dalpha, dbeta, dS_kk_0, dS_kv_0 = _given(q, *found)
    return dq, dk, dv, dg, dalpha, dbeta, dS_kk_0, dS_kv_0


_backward_operator = torch.library.custom_op("gka::backward", _backward, mutates_args=())


@_backward_operator.register_fake
def _(*packed: Any) -> tuple[Tensor, ...]:
    like = (None if x is None else torch.empty_like(x).contiguous() for x in packed[:8])
    return tuple(_given(packed[0], *like))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *packed, _, _ = inputs
    ctx.save_for_backward(*packed[:TENSORS], *output[1:])
    ctx.numbers = packed[TENSORS:]
    ctx.set_materialize_grads(False)
    ctx.output_like = (output[0].shape, output[0].dtype, output[0].device)


def _autograd_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    do, dS_kk, dS_kv, *_ = gradients
    if do is None:
        shape, dtype, device = ctx.output_like
        do = torch.zeros(shape, dtype=dtype, device=device)
    if dS_kk is not None and dS_kk.numel() == 0:
        dS_kk = None
    if dS_kv is not None and dS_kv.numel() == 0:
        dS_kv = None
    saved = ctx.saved_tensors  # only once: under activation checkpointing, unpacking recomputes the tensors
    found: list[Tensor | None]
    if torch.is_grad_enabled():  # create_graph=True
        found = _gradients_with_graph(saved, ctx.numbers, (do, dS_kk, dS_kv))
    else:
        backward = _backward_operator if must_dispatch(do) else _backward
        grads = backward(*saved, do, dS_kk, dS_kv, *ctx.numbers)
        found = [None if tensor is None else grad for tensor, grad in zip(saved[:8], grads, strict=True)]
    others = 1 + len(ctx.numbers) + 2  # cu_seqlens, the numbers, output_final_state and save
    return *found, *([None] * others)


def _gradients_with_graph(
    saved: Sequence[Tensor | None], numbers: Sequence[Any], d_outputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of the eight inputs, for autograd to differentiate again: by the differentiable form."""
    arguments = _unpack(saved[:TENSORS], *numbers)
    warn_slow_derivatives(arguments)

    def function(*inputs: Tensor | None) -> Sequence[Tensor | None]:
        again = Arguments._make((*inputs, *arguments[len(inputs) :]))
        return differentiable.forward(again, output_final_state=True, save=False)[:3]

    return gradients_with_graph(function, arguments.differentiable, d_outputs)


_forward_operator.register_autograd(_autograd_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The operator without PyTorch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *packed: Any) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = _forward(*packed)
        _setup_context(ctx, packed, outputs)
        ctx.mark_non_differentiable(*outputs[3:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _autograd_backward(ctx, *gradients)


flops.register(torch.ops.gka.forward, torch.ops.gka.backward, _unpack, TENSORS)
