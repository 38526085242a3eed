"""The op by Triton kernels: both passes as lists of their stages, each of which stands beside its kernel.

`call.py` has what a call needs: sizes, tables, workspace. Chunks are worked through in parts, which share one
workspace; the states at some chunks' starts, the edges, are kept for the backward pass.

    forward     edges at once; then part by part states, solutions, o
    backward    parts from last to first: states, dy, adjoint solutions, dq, gradients of the states, dv, dk and dg

Legend: B batch, T time, H query heads, Hk key/value heads, D key dim, V value dim, N sequences.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from ..types import Arguments, Gradients, Outputs, Saved
from . import config
from .call import BackwardWorkspace, Call, Edges, chunk_size, default_chunk_size, empty_saved, solution_pair
from .kernels.local import launch_key_gradients, launch_value_gradients
from .kernels.prepare import launch_scales_of_rows, launch_weigh_tokens
from .kernels.readout import launch_query_gradients, launch_read_gradients, launch_read_states
from .kernels.solve import launch_solve_chunks
from .kernels.state import launch_find_edges, launch_scan_states
from .kernels.state_gradients import launch_increments_kk, launch_increments_kv, launch_scan_gradients
from .launch import can_compile_side_by_side, compiling_ahead, on_device, side_by_side

__all__ = ["backward", "compile_ahead", "default_chunk_size", "empty_saved", "forward"]


def forward(arguments: Arguments, *, output_final_state: bool, save: bool) -> Outputs:
    """The op; `save` keeps what `backward` needs."""
    if not config.INTERPRETED:
        compile_ahead(arguments, output_final_state=output_final_state, save=save)
    call, saved = Call(arguments), empty_saved(arguments)
    o = call.empty(call.B, call.T, call.H, call.V, dtype=call.q.dtype)
    final_kk = final_kv = None
    if output_final_state:
        final_kv = call.empty(call.N, call.H, call.D, call.V)
        final_kk = call.empty(call.N, call.H, call.D, call.D) if call.solve else None
    x, edges = solution_pair(call, saved), Edges(saved.edge_kk, saved.edge_kv)
    with on_device(call.device):
        states = call.empty_states(torch.bfloat16)
        scales = launch_scales_of_rows(call)
        weights = launch_weigh_tokens(call, scales=scales)
        launch_find_edges(call, weights=weights, edges=edges)
        for part in call.parts:
            launch_scan_states(
                call, part, weights=weights, edges=edges, states=states, final_kk=final_kk, final_kv=final_kv
            )
            if call.solve:
                launch_solve_chunks(
                    call, part, rhs=call.q, rhs_scale=scales.query, key_scale=scales.key,
                    x=x, norm=saved.norm, states=states,
                )  # fmt: skip
            launch_read_states(call, part, scales=scales, x=x, states=states, o=o)
    return Outputs(o, final_kk, final_kv, saved if save else Saved())


def backward(
    arguments: Arguments,
    *,
    saved: Saved,
    final: tuple[Tensor, Tensor],
    do: Tensor,
    d_final: tuple[Tensor | None, Tensor | None],
) -> Gradients:
    """Gradients of the inputs from those of o and of the final states, which are not looked at themselves."""
    call, do = Call(arguments), do.contiguous()
    out, d_final_states = _empty_gradients(call), _given_or_zero(final, d_final)
    with on_device(call.device):
        work = BackwardWorkspace(call, saved)
        scales = launch_scales_of_rows(call)
        weights = launch_weigh_tokens(call, scales=scales)
        for part in reversed(call.parts):
            launch_scan_states(call, part, weights=weights, edges=work.edges, states=work.states)
            launch_read_gradients(call, part, work, scales=scales, do=do)
            if call.solve:
                launch_solve_chunks(
                    call, part, rhs=work.dy, rhs_scale=call.alpha, key_scale=scales.key,
                    x=work.z, norm=work.norm, states=work.states, y=work.x, inner_yAx=work.inner_zAx,
                )  # fmt: skip
            launch_query_gradients(call, part, work, scales=scales, dq=out.q, dalpha=out.alpha)
            if call.solve:
                launch_increments_kk(call, part, work, scales=scales)
            launch_increments_kv(call, part, work, scales=scales, do=do)
            launch_scan_gradients(
                call, part, work, weights=weights, d_final=d_final_states, d_initial=Edges(out.S_kk, out.S_kv)
            )
            launch_value_gradients(call, part, work, scales=scales, do=do, dv=out.v)
            launch_key_gradients(call, part, work, scales=scales, dk=out.k, dg=out.g, dbeta=out.beta)
    return out._replace(k=_sum_groups(out.k, call.Hk), v=_sum_groups(out.v, call.Hk))


def _empty_gradients(call: Call) -> Gradients:
    """Uninitialised, those of k and v for every query head: [B, T, H, .]."""
    optional = (call.alpha, call.beta, call.S_kk, call.S_kv)
    dalpha, dbeta, dS_kk, dS_kv = [None if x is None else torch.empty_like(x) for x in optional]
    if not call.solve and dalpha is not None:
        dalpha.zero_()
    dk, dv = [call.empty(call.B, call.T, call.H, width, dtype=call.q.dtype) for width in (call.D, call.V)]
    return Gradients(torch.empty_like(call.q), dk, dv, torch.empty_like(call.g), dalpha, dbeta, dS_kk, dS_kv)


def _given_or_zero(final: tuple[Tensor, Tensor], d_final: tuple[Tensor | None, Tensor | None]) -> Edges:
    """Gradients of the final states, both or none; None for a state that there is not."""
    if d_final[0] is None and d_final[1] is None:
        return Edges(None, None)
    return Edges(*(
        (torch.zeros_like(state) if given is None else given.contiguous()) if state.numel() else None
        for state, given in zip(final, d_final, strict=True)
    ))  # fmt: skip


def _sum_groups(tensor: Tensor, Hk: int) -> Tensor:
    """[B, T, H, .] summed over the query heads of each key/value head, in float32."""
    if tensor.shape[2] == Hk:
        return tensor
    return tensor.unflatten(2, (Hk, -1)).sum(3, dtype=torch.float32).to(tensor.dtype)


_seen: set[tuple[Any, ...]] = set()  # calls whose kernels are compiled
_compiling = threading.Lock()


def compile_ahead(arguments: Arguments, *, output_final_state: bool, save: bool) -> None:
    """Compile the kernels of a call like this, and of its backward pass if `save`, unless that was done."""
    shapes = tuple(None if x is None else (x.shape[2:], x.dtype) for x in arguments.differentiable)
    numbers = (
        len(arguments.solver_steps),
        arguments.solver,
        arguments.tolerance is None,
        chunk_size(arguments),
        arguments.normalize_qk,
        output_final_state,
        save,
    )
    key = (arguments.q.device, shapes, numbers)
    if key in _seen or compiling_ahead():
        return
    tensors: list[Any] = [None if x is None else x.new_empty(1, 1, *x.shape[2:]) for x in arguments[:6]]
    tensors += [None if x is None else x.new_empty(1, *x.shape[1:]) for x in arguments[6:8]]
    like = Arguments._make([*tensors, None, *arguments[9:]])
    with _compiling:
        if key not in _seen and can_compile_side_by_side():
            with side_by_side():
                if save:  # first, since its kernels take longest to compile
                    do = like.q.new_empty(1, 1, like.q.shape[2], like.v.shape[3])
                    backward(like, saved=empty_saved(like), final=(do, do), do=do, d_final=(None, None))
                forward(like, output_final_state=output_final_state, save=save)
        _seen.add(key)
