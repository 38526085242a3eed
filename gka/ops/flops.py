"""Floating point operations of the op and of a decode step, for `torch.utils.flop_counter.FlopCounterMode`.

Products alone count, as PyTorch counts them: 2 m n k for one of [m, k] and [k, n]. They are those of the
chunk-wise form (`torch/chunk_math.py`), chunks filled up to C tokens. A product of the solver takes
2 C D^2 + 4 C^2 D for every chunk and head. A solve of n_1 + n_2 + ... Chebyshev nodes takes n_1 + n_2 + ... - 1 of
them, conjugate gradient n_1 + n_2 + ...; a tolerance counts as if it were never reached.

Legend: D key dim, V value dim, C tokens per chunk, n chunks of all sequences, H query heads, Hk key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

from .._when_imported import when_imported
from .plan import Plan
from .transforms import has_values
from .types import Arguments


def _chunks(a: Arguments, C: int) -> int:
    """n; of packed sequences without values the most that there may be."""
    B, T = a.q.shape[:2]
    if a.cu_seqlens is None:
        return B * -(-T // C)
    if not has_values(a.cu_seqlens):
        return T // C + a.sequences
    return sum(-(-(end - start) // C) for start, end in pairwise(a.cu_seqlens.tolist()))


def _solves(a: Arguments, C: int, more: int = 0) -> int:
    """A solve in a chunk of one head, with its norms, and so many products more."""
    D = a.q.shape[3]
    norms = 2 * C * D * D + 2 * C * C + 2 * C**3
    return norms + (a.plan.products + more) * (2 * C * D * D + 4 * C * C * D)


def forward_flops(a: Arguments, C: int) -> int:
    """Of the whole sequences, forward."""
    H, D, Hk, V = *a.q.shape[2:], *a.v.shape[2:]
    per_head = 2 * C * D * V + 2 * C * D * V + 2 * C * C * (D + V)  # the state S_kv and the readout
    per_kv_head = 0
    if a.solver_steps:
        per_head += 2 * C * D * D + _solves(a, C)
        per_kv_head = 2 * C * C * D
    return _chunks(a, C) * (H * per_head + Hk * per_kv_head)


def backward_flops(a: Arguments, C: int) -> int:
    """Of the gradients; the states are computed twice more."""
    H, D, Hk, V = *a.q.shape[2:], *a.v.shape[2:]
    per_head = 2 * 2 * C * D * V + 8 * C * D * V + 6 * C * C * (D + V)
    per_kv_head = 0
    if a.solver_steps:
        per_head += 2 * 2 * C * D * D + _solves(a, C, more=1)
        per_head += 2 * C * C + 6 * C * D * D + 10 * C * C * D + 2 * C**3  # `SolveAdjoint`
        per_kv_head = 4 * C * C * D
    return _chunks(a, C) * (H * per_head + Hk * per_kv_head)


def step_flops(q: Any, v: Any, plan: Plan) -> int:
    """Of one token of every sequence, q [B, H, D] and v [B, Hk, V]; the states' updates are no products."""
    B, H, D = q.shape
    return int(B * H * (2 * D * D * plan.products + 2 * D * v.shape[2]))


def register(forward: Any, backward: Any, unpack: Any, tensors: int) -> None:
    """Give PyTorch's counter the formulas of the operators of `custom_op`; `unpack` takes their arguments."""

    def count_forward(*packed: Any, out_val: Any = None) -> int:
        a = unpack(packed[:tensors], *packed[tensors:-2])
        return forward_flops(a, a.chunk_size)

    def count_backward(*packed: Any, out_val: Any = None) -> int:
        a = unpack(packed[:tensors], *packed[-8:])
        return backward_flops(a, a.chunk_size)

    _when_counted(forward, count_forward)
    _when_counted(backward, count_backward)


def register_steps(*operators: Any) -> None:
    """The same for operators of a decode step: eight tensors, `Arguments.numbers`, and maybe indices."""

    def count(*packed: Any, out_val: Any = None) -> int:
        a = Arguments.of((*packed[:8], None), *packed[8:14])
        return step_flops(a.q, a.v, a.plan)

    _when_counted(list(operators), count)


def _when_counted(operators: Any, count: Callable[..., int]) -> None:
    """Register once the counter is imported: its module imports Triton, which takes half a second."""

    def change(flop_counter: ModuleType) -> None:
        flop_counter.register_flop_formula(operators, get_raw=True)(count)

    when_imported("torch.utils.flop_counter", change)
