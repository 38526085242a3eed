"""Rows of a pool: one tensor holds the states of all requests, and an index tells the row of each.

Servers decode so. An index below 0 is padding: it reads zeros and writes nothing. No function waits for the
device, so that all of them can be captured in a CUDA graph.

Legend: N rows of the pool, B indices, H heads, D key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_state_indices
from .types import State


def gather_states(
    pool: State | Sequence[Tensor | None], state_indices: Tensor, has_initial: Tensor | None = None
) -> State:
    """The states of some requests, for `initial_state` of `gated_kalmanet`.

    Args:
        pool: S_kk [N, H, D, D] or None, and S_kv [N, H, D, V]; any strides.
        state_indices: [B] int32 or int64, the row of each request; below 0 means none.
        has_initial: [B] bool, False for a request that starts: its states are zero. None means all True.

    Returns:
        S_kk [B, H, D, D] or None, and S_kv [B, H, D, V]; copies, float32 for bfloat16 pools.

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape or device; on the CPU also an index of N or
            more. On a GPU such an index is undefined.
    """

    def gathered(part: Tensor) -> Tensor:
        rows = gather_rows(part, state_indices, has_initial)
        return rows.to(torch.promote_types(part.dtype, torch.float32))

    S_kk, S_kv = _pair("pool", pool)
    return State(None if S_kk is None else gathered(S_kk), gathered(S_kv))


def scatter_states_(
    pool: State | Sequence[Tensor | None], state_indices: Tensor, state: State | Sequence[Tensor | None]
) -> None:
    """Write the states of some requests to their rows, rounded to the dtype of the pool.

    Args:
        pool: as in `gather_states`; written in place.
        state_indices: as in `gather_states`; no two of at least 0 may be equal.
        state: S_kk [B, H, D, D] and S_kv [B, H, D, V]; S_kk is None exactly if the pool's is.

    Raises:
        TypeError, ValueError: as `gather_states`; one of `pool` and `state` has no S_kk, the other has.
    """
    (pool_kk, pool_kv), (S_kk, S_kv) = _pair("pool", pool), _pair("state", state)
    if (pool_kk is None) != (S_kk is None):
        raise ValueError(
            f"state.S_kk is {'None' if S_kk is None else 'given'}; expected it exactly if pool.S_kk is given"
        )
    if pool_kk is not None and S_kk is not None:
        scatter_rows_(pool_kk, state_indices, S_kk)
    scatter_rows_(pool_kv, state_indices, S_kv)


def gather_rows(pool: Tensor, state_indices: Tensor, has_initial: Tensor | None = None) -> Tensor:
    """[B, ...], rows of a pool [N, ...]; zero for an index below 0 and where `has_initial` [B] is False."""
    check_state_indices(state_indices, pool)
    real = state_indices >= 0
    if has_initial is not None:
        _check_has_initial(has_initial, state_indices)
        real = real & has_initial
    rows = pool.index_select(0, state_indices.clamp(min=0))
    return torch.where(_as_column(real, pool), rows, torch.zeros((), dtype=pool.dtype, device=pool.device))


def scatter_rows_(pool: Tensor, state_indices: Tensor, rows: Tensor) -> None:
    """Write rows [B, ...] to a pool [N, ...], rounded to its dtype; none for an index below 0.

    A mask of the rows to write would have to be counted on the host. Instead a padding row repeats what the first
    real row writes. If there is none, row 0 is written with its own values.
    """
    check_state_indices(state_indices, pool)
    if rows.shape[1:] != pool.shape[1:] or rows.shape[0] != state_indices.shape[0]:
        expected = (state_indices.shape[0], *pool.shape[1:])
        raise ValueError(f"rows have shape {tuple(rows.shape)}; expected {expected}")
    if state_indices.shape[0] == 0:
        return
    real = state_indices >= 0
    own = torch.arange(state_indices.shape[0], device=pool.device)
    source = torch.where(real, own, real.int().argmax(0))
    target = state_indices.long().index_select(0, source).clamp(min=0)
    new = rows.to(pool.dtype).index_select(0, source)
    pool.index_copy_(0, target, torch.where(real.any(), new, pool.index_select(0, target[:1])))


def _as_column(mask: Tensor, like: Tensor) -> Tensor:
    """[B, 1, ...] with as many dims as `like`."""
    return mask.view(-1, *(1,) * (like.ndim - 1))


def _pair(name: str, state: Any) -> tuple[Tensor | None, Tensor]:
    if not isinstance(state, tuple | list):
        raise TypeError(f"{name} is a {type(state).__name__}; expected a pair (S_kk, S_kv)")
    if len(state) != 2 or not isinstance(state[1], Tensor):
        raise ValueError(f"{name} is not a pair; expected S_kk, a tensor or None, and S_kv, a tensor")
    return state[0], state[1]


def _check_has_initial(has_initial: Tensor, state_indices: Tensor) -> None:
    if has_initial.dtype != torch.bool:
        raise TypeError(f"has_initial has dtype {has_initial.dtype}; expected torch.bool")
    if has_initial.shape != state_indices.shape:
        raise ValueError(
            f"has_initial has shape {tuple(has_initial.shape)}; expected {tuple(state_indices.shape)}"
        )
    if has_initial.device != state_indices.device:
        raise ValueError(f"has_initial is on {has_initial.device}; expected {state_indices.device}")
