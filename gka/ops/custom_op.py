"""The op as torch custom operators: what autograd and torch.compile see of every backend.

A backend is a module with `forward`, `backward`, `empty_saved` (what `forward` saves, uninitialised: its shapes)
and `default_chunk_size`. As custom operators they are opaque to torch.compile, which traces shapes only, and
autocast is off in them.

Legend: B batch, T time, H query heads, Hk key/value heads, D key dim, V value dim, N sequences.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .types import Inputs, Options, Saved, State, state_dtype

_MODULES = {"chunked": ".torch.chunked", "triton": ".triton.op"}


def backend_module(name: str) -> ModuleType:
    """The module of a backend; that of Triton is imported when it is first asked for."""
    return importlib.import_module(_MODULES[name], __package__)


def gated_kalmanet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    *,
    backend: str,
    ridge_ratio: float,
    solver_steps: tuple[int, ...],
    scale: float,
    initial_state: State | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    normalize_qk: bool,
) -> tuple[Tensor, State | None]:
    """`gka.ops.gated_kalmanet`, whose checked arguments it takes, by a backend with custom operators."""
    inputs = (q, k, v, g, alpha, beta)
    states = (None, None) if initial_state is None else (initial_state.S_kk, initial_state.S_kv)
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (*inputs, *states)
    )
    o, S_kk, S_kv, *_ = _forward(
        *inputs,
        *states,
        cu_seqlens,
        backend,
        ridge_ratio,
        list(solver_steps),
        scale,
        chunk_size or 0,
        normalize_qk,
        output_final_state,
        differentiable,
    )
    if not output_final_state:
        return o, None
    return o, State(S_kk if solver_steps else None, S_kv)


def _given(like: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """The tensors, and an empty one for None: an operator must return a tensor."""
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]


def _options(
    q: Tensor,
    backend: str,
    ridge_ratio: float,
    solver_steps: Sequence[int],
    scale: float,
    chunk_size: int,
    normalize_qk: bool,
) -> Options:
    """The numbers as an operator gets them; chunk_size 0 stands for what suits the device."""
    C = chunk_size or backend_module(backend).default_chunk_size(q.device)
    return Options(ridge_ratio, tuple(solver_steps), scale, C, normalize_qk)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with autocast off: dtypes are chosen here, whatever surrounds the call."""

    @functools.wraps(function)
    def call(q: Tensor, *others: Any) -> Any:
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *others)

    return call


@torch.library.custom_op("gka::forward", mutates_args=())
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
    chunk_size: int,
    normalize_qk: bool,
    output_final_state: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the final S_kk and S_kv, and x, x_lo, norm, edge_kk, edge_kv of `Saved`; empty for None."""
    inputs = Inputs(q, k, v, g, alpha, beta, S_kk, S_kv, cu_seqlens)
    options = _options(q, backend, ridge_ratio, solver_steps, scale, chunk_size, normalize_qk)
    o, final_kk, final_kv, saved = backend_module(backend).forward(inputs, options, output_final_state, save)
    final_kk, final_kv, x, x_lo, norm, edge_kk, edge_kv = _given(q, final_kk, final_kv, *saved)
    return o, final_kk, final_kv, x, x_lo, norm, edge_kk, edge_kv


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (backend, *numbers, output_final_state, save) = Inputs(*arguments[:9]), arguments[9:]
    options = _options(inputs.q, backend, *numbers)
    q, V, N = inputs.q, inputs.v.shape[3], inputs.sequences
    B, T, H, D = q.shape
    final_kk = final_kv = None
    if output_final_state:
        final_kv = q.new_empty(N, H, D, V, dtype=state_dtype(q.dtype))
        final_kk = q.new_empty(N, H, D, D, dtype=state_dtype(q.dtype)) if options.solver_steps else None
    saved = backend_module(backend).empty_saved(inputs, options) if save else Saved()
    return q.new_empty(B, T, H, V), *_given(q, final_kk, final_kv, *saved)


@torch.library.custom_op("gka::backward", mutates_args=())
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
    chunk_size: int,
    normalize_qk: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Gradients`, empty for None."""
    inputs = Inputs(q, k, v, g, alpha, beta, S_kk, S_kv, cu_seqlens)
    options = _options(q, backend, ridge_ratio, solver_steps, scale, chunk_size, normalize_qk)
    saved, final = Saved(x, x_lo, norm, edge_kk, edge_kv), (final_kk, final_kv)
    found = backend_module(backend).backward(inputs, options, saved, final, do, (dS_kk, dS_kv))
    dq, dk, dv, dg, dalpha, dbeta, dS_kk_0, dS_kv_0 = _given(q, *found)
    return dq, dk, dv, dg, dalpha, dbeta, dS_kk_0, dS_kv_0


@_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    like = (None if x is None else torch.empty_like(x).contiguous() for x in arguments[:8])
    return tuple(_given(arguments[0], *like))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:9], *output[1:])
    ctx.options = inputs[9:15]
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
    saved = ctx.saved_tensors  # only once: unpacking is what recomputes under activation checkpointing
    grads = _backward(*saved, do, dS_kk, dS_kv, *ctx.options)
    found = [None if tensor is None else grad for tensor, grad in zip(saved, grads, strict=False)]
    return *found, *([None] * 9)


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
