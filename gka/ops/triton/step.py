"""One token by the kernel `gka.ops.triton.kernels.step`: a program per sequence and head, one launch.

    S_kk <- e^g S_kk + beta^2 k k^T        S_kv <- e^g S_kv + beta^2 k v^T
    x = (S_kk + a ||S_kk||_F I)^{-1} q     o = scale * (q + alpha (x - q))^T S_kv

As custom operators, one that returns new states and one that writes over those given, it is opaque to
torch.compile. It has no gradients.

Legend: B sequences, H query heads, Hk key/value heads, D key dim, V value dim.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..flops import register_steps
from ..solvers import node_steps
from ..transforms import must_dispatch
from ..types import Arguments, State
from .config import INTERPRETED, step_config
from .kept import to_keep


def gated_kalmanet_step(
    arguments: Arguments, *, inplace: bool, state_indices: Tensor | None = None
) -> tuple[Tensor, State]:
    """The kernel's form of `gka.ops.gated_kalmanet_step`, whose checked arguments it takes."""
    S_kk, S_kv = arguments.S_kk, arguments.S_kv
    assert S_kv is not None
    by_operator = must_dispatch(arguments.q)
    if inplace:
        state = State(S_kk, S_kv)
        if by_operator:
            traced_o: Tensor = _step_(*_pack(arguments), state_indices)
            return traced_o, state
        o = _launch(arguments, state, state_indices)
        for held in state:  # as an operator would, for a graph that still wants what they held
            if held is not None and not held.is_inference():
                torch.autograd.graph.increment_version(held)
        return o, state
    o, S_kk, S_kv = _step(*_pack(arguments)) if by_operator else _stepped(arguments)
    return o, State(S_kk if arguments.solver_steps else None, S_kv)


@cache  # a CUDA graph may read them as long as the process lives
def _node_table(solver_steps: tuple[int, ...], ridge_ratio: float, device: torch.device) -> Tensor:
    """Step sizes of all stages in a row, negative where a later stage starts, and one more that is read unused."""
    taus: list[float] = []
    for n in solver_steps:
        first, *others = node_steps(n, ridge_ratio)
        taus += [-first if taus else first, *others]
    return to_keep(lambda: torch.tensor([*taus, 0.0], dtype=torch.float32, device=device), device)


@cache  # as above
def _end_table(solver_steps: tuple[int, ...], device: torch.device) -> Tensor:
    """The end of the stage of each product of conjugate gradient; a residual between stages is an end itself."""
    ends: list[int] = []
    for n in solver_steps:
        end = len(ends) + n
        ends += [end] * (n + 1)
    return to_keep(lambda: torch.tensor(ends[:-1], dtype=torch.int32, device=device), device)


def _launch(arguments: Arguments, new_state: State, state_indices: Tensor | None = None) -> Tensor:
    """o; `new_state` is written, and may be the state so far, whose tensors need not be contiguous.

    With `state_indices` it is the pool so far, of contiguous rows; no part of it is copied.
    """
    from .kernels.step import step_token  # Triton is needed where the kernel runs, not where it is traced
    from .launch import launch, on_device, or_stand_in

    device, solver_steps = arguments.q.device, arguments.solver_steps
    if not (arguments.q.is_cuda or INTERPRETED):
        raise ValueError(f"the kernel of a step needs tensors on a GPU, not on {device}")
    cg, tolerance = arguments.solver == "cg", arguments.tolerance
    if cg:
        table, steps = _end_table(solver_steps, device), sum(solver_steps) + len(solver_steps) - 1
    else:
        table, steps = _node_table(solver_steps, arguments.ridge_ratio, device), sum(solver_steps)
    B, H, D = arguments.q.shape
    Hk, V = arguments.v.shape[1:]
    o = torch.empty(B, H, V, dtype=arguments.q.dtype, device=device)
    q, k, v = (_in_rows(x) for x in (arguments.q, arguments.k, arguments.v))
    g, alpha, beta, kk, kv = arguments.differentiable[3:]
    new_kk: Tensor | None
    new_kv: Tensor | None
    new_kk, new_kv = new_state
    is_pool = state_indices is not None
    if not is_pool:
        kk, kv, new_kk, new_kv = map(_contiguous, (kk, kv, new_kk, new_kv))
    assert kv is not None
    with on_device(device):
        launch(step_token, B * H,
            q_ptr=q, k_ptr=k, v_ptr=v,
            g_ptr=_contiguous(g), alpha_ptr=_contiguous(alpha), beta_ptr=_contiguous(beta),
            q_stride=q.stride(0), k_stride=k.stride(0), v_stride=v.stride(0),
            kk_ptr=or_stand_in(kk, kv), kv_ptr=kv,
            new_kk_ptr=or_stand_in(new_kk, new_kv), new_kv_ptr=new_kv, o_ptr=o,
            steps_ptr=table, index_ptr=_contiguous(state_indices),
            kk_stride=kk.stride(0) if is_pool and kk is not None else 0, kv_stride=kv.stride(0) if is_pool else 0,
            scale=arguments.scale, ridge_ratio=arguments.ridge_ratio, tolerance=tolerance or 0.0,
            steps=steps, H=H, Hk=Hk, D=D, V=V, SOLVE=bool(solver_steps), CG=cg, TOLERANCE=tolerance is not None,
            HAS_ALPHA=alpha is not None, HAS_BETA=beta is not None, NORMALIZE=arguments.normalize_qk,
            POOL=is_pool, **step_config(kv.dtype, D, V),
        )  # fmt: skip
    for target, computed in zip(new_state, (new_kk, new_kv), strict=True):
        if target is not None and computed is not None and target is not computed:
            target.copy_(computed)
    return o


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _in_rows(x: Tensor) -> Tensor:
    """x [B, H, D] whose heads lie side by side; sequences may lie apart, as after a split of their channels."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _stepped(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """o and the new S_kk (empty for None) and S_kv."""
    S_kk, S_kv = arguments.S_kk, arguments.S_kv
    assert S_kv is not None
    new_kk = None if S_kk is None else torch.empty_like(S_kk, memory_format=torch.contiguous_format)
    new_kv = torch.empty_like(S_kv, memory_format=torch.contiguous_format)
    o = _launch(arguments, State(new_kk, new_kv))
    return o, arguments.q.new_empty(0) if new_kk is None else new_kk, new_kv


def _pack(arguments: Arguments) -> tuple[Any, ...]:
    """The arguments as the operators below take them; `_unpack` is the inverse."""
    return *arguments.differentiable, *arguments.numbers


def _unpack(*packed: Any) -> Arguments:
    return Arguments.of((*packed[:8], None), *packed[8:])


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? alpha, Tensor? beta"
_NUMBERS = "float ridge_ratio, SymInt[] solver_steps, float scale, bool normalize_qk, str solver, float? tolerance"


@torch.library.custom_op(
    "gka::step",
    mutates_args=(),
    schema=f"({_TENSORS}, Tensor? S_kk, Tensor S_kv, {_NUMBERS}) -> (Tensor, Tensor, Tensor)",
)
def _step(*packed: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _stepped(_unpack(*packed))


@_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, alpha: Tensor | None, beta: Tensor | None,
      S_kk: Tensor | None, S_kv: Tensor, *numbers: object) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    new_kk = q.new_empty(0) if S_kk is None else S_kk.new_empty(S_kk.shape)
    return q.new_empty(*q.shape[:2], v.shape[2]), new_kk, S_kv.new_empty(S_kv.shape)


@torch.library.custom_op(
    "gka::step_",
    mutates_args=("S_kk", "S_kv"),
    schema=f"({_TENSORS}, Tensor(a!)? S_kk, Tensor(b!) S_kv, {_NUMBERS}, Tensor? state_indices) -> Tensor",
)
def _step_(*packed: Any) -> Tensor:
    """o; S_kk and S_kv are brought up to date, with state_indices some of their rows."""
    *others, state_indices = packed
    arguments = _unpack(*others)
    assert arguments.S_kv is not None
    return _launch(arguments, State(arguments.S_kk, arguments.S_kv), state_indices)


@_step_.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: object) -> Tensor:
    return q.new_empty(*q.shape[:2], v.shape[2])


register_steps(torch.ops.gka.step, torch.ops.gka.step_)
