"""Checks of the arguments of `gated_kalmanet` and `gated_kalmanet_step`, and their errors.

Legend: B batch, T time, H query heads, D key dim, V value dim, N sequences.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .plan import SOLVERS, Plan, default_solver_steps
from .transforms import has_values, transforms_active, unwrapped
from .triton import config as triton_config
from .types import State, state_dtype

MAX_DIM = 256
NEVER_WAITING = ("cpu",)  # kinds of devices whose values can be read without waiting
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_floats(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None and name in ("alpha", "beta"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected one of {', '.join(map(str, _FLOATS))}")


def check_same_dtype(q: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected q's, {q.dtype}")


def check_same_device(q: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}; expected q's device, {q.device}")


def check_dims(q: Tensor, dims: int, layout: str) -> None:
    if q.ndim != dims:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected {dims} dims, {layout}")
    if not 1 <= q.shape[-1] <= MAX_DIM:
        raise ValueError(f"q has head dim D = {q.shape[-1]}; expected 1 to {MAX_DIM}")


def check_heads_and_dims(k: Tensor, v: Tensor, H: int, D: int, head_dim: int) -> None:
    for name, tensor in (("k", k), ("v", v)):
        if tensor.ndim != head_dim + 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {head_dim + 2} dims, like q")
    if k.shape[-1] != D:
        raise ValueError(f"k has head dim {k.shape[-1]}; expected q's, D = {D}")
    if v.shape[-1] < 1:
        raise ValueError(f"v has shape {tuple(v.shape)}; expected a value dim V of at least 1")
    Hk = v.shape[head_dim]
    if k.shape[head_dim] != Hk:
        raise ValueError(f"k has {k.shape[head_dim]} heads and v has {Hk}; expected as many of both")
    if Hk < 1 or H % Hk:
        raise ValueError(f"k and v have {Hk} heads; expected a divisor of q's {H} heads")


def check_shapes(tensors: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    for name, (tensor, expected) in tensors.items():
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {expected}")


def check_tokens(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, alpha: Tensor | None, beta: Tensor | None, layout: str
) -> None:
    """Dtypes and shapes of the tokens' tensors, which fit q; its layout is "[B, T, H, D]" or "[B, H, D]"."""
    check_floats(q=q, k=k, v=v, g=g, alpha=alpha, beta=beta)
    check_same_dtype(q, k=k, v=v)
    dims = layout.count(",") + 1
    check_dims(q, dims, layout)
    *lead, H, D = q.shape
    # A right shape is seen first: a traced length then need not differ from the number of heads.
    if tuple(g.shape) != (*lead, H) and dims == 4 and tuple(g.shape) == (lead[0], H, lead[1]):
        raise ValueError(
            f"g has shape {tuple(g.shape)}; expected {(*lead, H)}, [B, T, H], from q's shape {tuple(q.shape)}; "
            "is q [B, H, T, D]? It must be [B, T, H, D]"
        )
    check_heads_and_dims(k, v, H, D, dims - 2)
    Hk, V = v.shape[-2:]
    check_shapes({"k": (k, (*lead, Hk, D)), "v": (v, (*lead, Hk, V))})
    check_shapes({name: (x, (*lead, H)) for name, x in (("g", g), ("alpha", alpha), ("beta", beta))})


def check_numbers(**numbers: float) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"{name} is {number!r}; expected a number")
        if not 0.0 < number < float("inf"):
            raise ValueError(f"{name} is {number}; expected a finite number greater than 0")


def checked_plan(
    solver: str, solver_steps: Sequence[int] | None, tolerance: float | None, dtype: torch.dtype
) -> Plan:
    """The solver for inputs of `dtype`, with the default steps where none are given."""
    check_solver(solver, tolerance)
    if solver_steps is None:
        return Plan(default_solver_steps(dtype, solver, tolerance), solver, tolerance)
    wrong = isinstance(solver_steps, str | int) or not isinstance(solver_steps, Sequence)
    if wrong or any(isinstance(n, bool) or not isinstance(n, int) for n in solver_steps):
        raise TypeError(
            f"solver_steps is {solver_steps!r}; expected a sequence of integers such as (31,) or (16, 16)"
        )
    if any(n < 1 for n in solver_steps):
        raise ValueError(f"solver_steps is {tuple(solver_steps)}; expected at least one step in every stage")
    if not solver_steps and solver != "chebyshev":
        raise ValueError(f"solver is {solver!r}; expected 'chebyshev' with solver_steps=(), which solves nothing")
    return Plan(tuple(solver_steps), solver, tolerance)


def check_solver(solver: Any, tolerance: Any) -> None:
    """Raise ValueError unless the solver exists and may have the tolerance."""
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; expected one of {SOLVERS}")
    if tolerance is None:
        return
    if solver != "cg":
        raise ValueError(
            f"tolerance is {tolerance!r}; expected None with solver={solver!r}, of fixed steps; solver='cg' "
            "takes a tolerance"
        )
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance is {tolerance!r}; expected None or a number between 0 and 1")


def checked_state(
    name: str,
    state: Any,
    N: int | None,
    H: int,
    D: int,
    V: int,
    solver_steps: tuple[int, ...],
    q: Tensor,
    may_be_bfloat16: bool = False,
) -> State:
    """Check the pair (S_kk, S_kv) and return it as a State. N None is for a pool, of any number of rows."""
    if hasattr(state, "conv"):
        raise TypeError(f"{name} is a {type(state).__name__}, a layer's state; expected its field .state")
    if not isinstance(state, tuple | list):
        raise TypeError(f"{name} is a {type(state).__name__}; expected a pair (S_kk, S_kv)")
    if len(state) != 2:
        raise ValueError(f"{name} has {len(state)} parts; expected a pair (S_kk, S_kv)")
    dtype = state_dtype(q.dtype)
    is_pool = N is None
    if N is None:
        N = state[1].shape[0] if isinstance(state[1], Tensor) and state[1].ndim else 1
    parts: list[tuple[str, Any, tuple[int, ...]]] = [("S_kv", state[1], (N, H, D, V))]
    if solver_steps:
        parts.append(("S_kk", state[0], (N, H, D, D)))
    elif state[0] is not None:
        raise ValueError(f"{name}.S_kk is given; expected None, as solver_steps=() keeps no S_kk")
    for part, tensor, expected in parts:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}.{part} is a {type(tensor).__name__}; expected a torch.Tensor {expected}")
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name}.{part} has shape {tuple(tensor.shape)}; expected {expected}")
        if part == "S_kk" and tensor.dtype != state[1].dtype and may_be_bfloat16:
            raise TypeError(f"{name}.S_kk has dtype {tensor.dtype}; expected S_kv's, {state[1].dtype}")
        narrow = may_be_bfloat16 and tensor.dtype == torch.bfloat16 and q.dtype != torch.float64
        if tensor.dtype != dtype and not narrow:
            raise TypeError(f"{name}.{part} has dtype {tensor.dtype}; expected {dtype} for {q.dtype} inputs")
        check_same_device(q, **{f"{name}.{part}": tensor})
        if is_pool:
            check_rows_contiguous(f"{name}.{part}", tensor)
    return State(*state)


def check_rows_contiguous(name: str, pool: Tensor) -> None:
    """Raise ValueError unless each row of a pool lies in memory without gaps; between rows there may be some."""
    expected = 1
    for size, stride in zip(reversed(pool.shape[1:]), reversed(pool.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            raise ValueError(
                f"{name} has strides {pool.stride()}; expected each row {tuple(pool.shape[1:])} contiguous"
            )
        expected *= size


def check_state_indices(state_indices: Any, pool: Tensor) -> None:
    """Check the rows [B] of a pool [N, ...]; their values only where they can be read without waiting."""
    if not isinstance(state_indices, Tensor):
        raise TypeError(f"state_indices is a {type(state_indices).__name__}; expected a torch.Tensor of integers")
    if state_indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"state_indices has dtype {state_indices.dtype}; expected torch.int32 or torch.int64")
    if state_indices.ndim != 1:
        raise ValueError(f"state_indices has shape {tuple(state_indices.shape)}; expected [B]")
    if state_indices.device != pool.device:
        raise ValueError(f"state_indices is on {state_indices.device}; expected the pool's device, {pool.device}")
    rows = pool.shape[0]
    if rows == 0 and state_indices.shape[0]:
        raise ValueError("the pool has 0 rows; expected at least 1")
    if state_indices.numel() and values_may_be_read(state_indices):
        largest = int(unwrapped(state_indices).amax())
        if largest >= rows:
            raise ValueError(f"state_indices has a value of {largest}; expected less than the pool's {rows} rows")


def values_may_be_read(tensor: Tensor) -> bool:
    """Whether a check may read values: always on the CPU, on other devices only if GKA_CHECK_VALUES is 1."""
    if torch.compiler.is_compiling() or not has_values(tensor):
        return False
    return tensor.device.type in NEVER_WAITING or os.environ.get("GKA_CHECK_VALUES") == "1"


def require(fits: Tensor, error: str) -> None:
    """ValueError if `fits`, a bool, is False; where its value may not be read, an assertion of the device."""
    if values_may_be_read(fits):
        if not fits:
            raise ValueError(error)
    elif fits.device.type != "meta":
        torch._assert_async(fits, error)


_told_slow: set[tuple[str, torch.dtype, int, int | None]] = set()


@triton_config.constant_when_compiled
def warn_slow(name: str, dtype: torch.dtype, D: int, chunk_size: int | None = None, why: str = "") -> bool:
    """Warn that a GPU runs the op in PyTorch, and name the fast settings; once for each combination of arguments.

    Args:
        name: name of the function.
        dtype, D, chunk_size: arguments of the call.
        why: another reason, if these arguments are not the cause.

    Returns:
        True, which torch.compile treats as a constant.
    """
    if (name, dtype, D, chunk_size) not in _told_slow:
        _told_slow.add((name, dtype, D, chunk_size))
        fast = {
            "gated_kalmanet": triton_config.fast_inputs(lambda dtype, D: triton_config.supports(dtype, D, None))
            + f", chunk_size None or {triton_config.CHUNK_SIZES[-1]}",
            "gated_kalmanet_step": triton_config.fast_inputs(triton_config.supports_step),
        }[name]
        warnings.warn(
            f"{name} runs in PyTorch on this GPU, much slower than by its kernels, for {dtype}, D = {D}, "
            f"chunk_size = {chunk_size}; fast are {fast}{why and '; ' + why}",
            stacklevel=4,
        )
    return True


def check_decay(g: Tensor) -> None:
    if g.numel() and values_may_be_read(g):
        largest = unwrapped(g).detach().amax().item()
        if not largest <= 0.0:
            why = "; is an input or a weight not finite?" if largest != largest else ""
            raise ValueError(f"g has a value of {largest}; expected log-decays of at most 0{why}")


def check_cu_seqlens(cu_seqlens: Tensor, B: int, T: int) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens is a {type(cu_seqlens).__name__}; expected a torch.Tensor of integers")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; expected torch.int32 or torch.int64")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected [N + 1]")
    if transforms_active() and torch._C._functorch.is_batchedtensor(cu_seqlens):
        raise ValueError("cu_seqlens is mapped by torch.vmap; expected the same for all samples, in_dims=None")
    if B != 1:
        raise ValueError(f"q has batch size {B}; expected 1 with cu_seqlens: concatenate the sequences")
    if values_may_be_read(cu_seqlens):
        edges = unwrapped(cu_seqlens).tolist()
        if edges[0] != 0 or edges[-1] != T or edges != sorted(edges):
            raise ValueError(f"cu_seqlens is {edges}; expected to rise from 0 to T = {T}")
