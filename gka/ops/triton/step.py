"""One token by the kernel `gka.ops.triton.kernels.step`: a program per sequence and head, one launch.

    S_kk <- e^g S_kk + beta^2 k k^T        S_kv <- e^g S_kv + beta^2 k v^T
    x = (S_kk + a ||S_kk||_F I)^{-1} q     o = scale * (q + alpha (x - q))^T S_kv

As custom operators, one that returns new states and one that writes over those given, it is opaque to
torch.compile. It has no gradients.

Legend: B sequences, H query heads, Hk key/value heads, D key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..solvers import node_steps
from ..types import State
from .config import INTERPRETED, step_config


def gated_kalmanet_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    *,
    state: State,
    ridge_ratio: float,
    solver_steps: tuple[int, ...],
    scale: float,
    normalize_qk: bool,
    inplace: bool,
) -> tuple[Tensor, State]:
    """The kernel's form of `gka.ops.gated_kalmanet_step`, whose checked arguments it takes."""
    inputs = (q, k, v, g, alpha, beta, *state)
    options = (ridge_ratio, list(solver_steps), scale, normalize_qk)
    # The way through an operator takes longer than the launch: it is for whom only traces.
    traced = torch.compiler.is_compiling() or type(q) is not Tensor
    if inplace:
        o: Tensor = (_step_ if traced else _stepped_inplace)(*inputs, *options)
        if not traced:
            for held in state:  # as an operator would, for a graph that still wants what they held
                if held is not None and not held.is_inference():
                    torch.autograd.graph.increment_version(held)
        return o, state
    o, S_kk, S_kv = (_step if traced else _stepped)(*inputs, *options)
    return o, State(S_kk if solver_steps else None, S_kv)


@lru_cache(maxsize=64)
def _node_table(solver_steps: tuple[int, ...], ridge_ratio: float, device: torch.device) -> Tensor:
    """Step sizes of all stages in a row, negative where a later stage starts, and one more that is read unused."""
    taus: list[float] = []
    for n in solver_steps:
        first, *rest = node_steps(n, ridge_ratio)
        taus += [-first if taus else first, *rest]
    return torch.tensor([*taus, 0.0], dtype=torch.float32, device=device)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    state: State,
    new_state: State,
    ridge_ratio: float,
    solver_steps: Sequence[int],
    scale: float,
    normalize_qk: bool,
) -> Tensor:
    """o; `new_state` is written, and may be `state`, whose tensors need not be contiguous."""
    from .kernels.step import step_token  # Triton is needed where the kernel runs, not where it is traced
    from .launch import both, launch, on_device

    if not (q.is_cuda or INTERPRETED):
        raise ValueError(f"the kernel of a step needs tensors on a GPU, not on {q.device}")
    B, H, D = q.shape
    Hk, V = v.shape[1:]
    o = torch.empty(B, H, V, dtype=q.dtype, device=q.device)
    inputs = [x if x is None else x.contiguous() for x in (q, k, v, g, alpha, beta)]
    states, targets = ([x if x is None else x.contiguous() for x in both] for both in (state, new_state))
    table = _node_table(tuple(solver_steps), ridge_ratio, q.device)
    if B:
        with on_device(q.device):
            launch(step_token, B * H,
                *inputs, *both(*states), *both(*targets), o, table, scale, ridge_ratio, sum(solver_steps), H, Hk,
                D=D, V=V, SOLVE=bool(solver_steps), HAS_ALPHA=alpha is not None, HAS_BETA=beta is not None,
                NORMALIZE=normalize_qk, **step_config(state.S_kv.dtype, D, V),
            )  # fmt: skip
    for target, written in zip(new_state, targets, strict=True):
        if target is not None and written is not None and target is not written:
            target.copy_(written)
    return o


def _stepped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    S_kk: Tensor | None,
    S_kv: Tensor,
    ridge_ratio: float,
    solver_steps: Sequence[int],
    scale: float,
    normalize_qk: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o and the new S_kk (empty for None) and S_kv."""
    new_kk = None if S_kk is None else torch.empty_like(S_kk, memory_format=torch.contiguous_format)
    new_kv = torch.empty_like(S_kv, memory_format=torch.contiguous_format)
    options = (ridge_ratio, solver_steps, scale, normalize_qk)
    o = _launch(q, k, v, g, alpha, beta, State(S_kk, S_kv), State(new_kk, new_kv), *options)
    return o, q.new_empty(0) if new_kk is None else new_kk, new_kv


_step = torch.library.custom_op("gka::step", _stepped, mutates_args=())


@_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, alpha: Tensor | None, beta: Tensor | None,
      S_kk: Tensor | None, S_kv: Tensor, *options: object) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    new_kk = q.new_empty(0) if S_kk is None else S_kk.new_empty(S_kk.shape)
    return q.new_empty(*q.shape[:2], v.shape[2]), new_kk, S_kv.new_empty(S_kv.shape)


def _stepped_inplace(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    S_kk: Tensor | None,
    S_kv: Tensor,
    ridge_ratio: float,
    solver_steps: Sequence[int],
    scale: float,
    normalize_qk: bool,
) -> Tensor:
    """o; S_kk and S_kv are brought up to date."""
    state = State(S_kk, S_kv)
    return _launch(q, k, v, g, alpha, beta, state, state, ridge_ratio, solver_steps, scale, normalize_qk)


_step_ = torch.library.custom_op("gka::step_", _stepped_inplace, mutates_args=("S_kk", "S_kv"))


@_step_.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: object) -> Tensor:
    return q.new_empty(*q.shape[:2], v.shape[2])
