"""Pools of states for tests: rows of one storage with gaps between them, full of NaN where nothing belongs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from decode_helpers import StepCase, call_step, reference_step, step_arguments
from helpers import assert_close
from torch import Tensor

from gka.ops import State

ROWS = 7
INDICES = (5, -1, 0, 3, -7)
POOL_CASES = (
    StepCase(B=5, H=4, Hk=2, D=128, V=128, dtype=torch.bfloat16, state=torch.bfloat16),
    StepCase(B=5, D=16, V=24, solver_steps=(31,)),
    StepCase(B=5, H=3, Hk=3, D=5, V=9, alpha=False, state=torch.bfloat16),
    StepCase(B=5, H=2, D=33, V=70, solver_steps=(40,), solver="cg"),
    StepCase(B=5, H=1, D=40, V=300, solver_steps=(), beta=False),
)


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor, to compare NaN too."""
    return x.contiguous().view(torch.uint8)


def pages(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: Any, gap: int
) -> tuple[Tensor, list[Tensor]]:
    """One storage [ROWS, page] of NaN, and a pool [ROWS, *shape] for each shape, one after the other in a page.

    gap: elements before each part of a page.
    """
    sizes = [int(torch.Size(shape).numel()) for shape in shapes]
    page = sum(sizes) + gap * len(sizes)
    storage = torch.full((ROWS, page), torch.nan, dtype=dtype, device=device)
    pools, start = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        start += gap
        pools.append(storage[:, start : start + size].unflatten(1, shape))
        start += size
    return storage, pools


def state_pool(state: State, state_indices: Tensor, gap: int) -> tuple[Tensor, State]:
    """A storage and a pool in it with the rows of `state`; rows of padding are left out."""
    parts = [part for part in state if part is not None]
    storage, pools = pages([tuple(x.shape[1:]) for x in parts], parts[0].dtype, parts[0].device, gap)
    for pool, part in zip(pools, parts, strict=True):
        for row, index in enumerate(state_indices.tolist()):
            if index >= 0:
                pool[index] = part[row]
    return storage, State(*pools) if len(pools) == 2 else State(None, pools[0])


def assert_step_of_a_pool(
    function: Any, case: StepCase, index_dtype: torch.dtype = torch.int64, gap: int = 3, device: Any = "cpu"
) -> None:
    """A backend's step over a pool equals that of the gathered states in float64, and changes nothing else."""
    arguments = step_arguments(case, device)
    state_indices = torch.tensor(INDICES, dtype=index_dtype, device=device)
    expected_o, expected = reference_step(arguments)
    real = state_indices >= 0
    storage, pool = state_pool(arguments["state"], state_indices, gap)
    before = storage.clone()
    for name in ("q", "k", "v"):
        arguments[name][~real] = torch.nan
    o, returned = call_step(function, {**arguments, "state": pool}, inplace=True, state_indices=state_indices)
    assert all(x is given for x, given in zip(returned, pool, strict=True))
    assert not o[~real].any() and o.dtype == case.dtype
    bound = {torch.float32: 1e-5, torch.bfloat16: 4e-3}[case.dtype]
    assert_close({"o": o[real]}, {"o": expected_o[real]}, bound)
    for part, ref in zip(pool, expected, strict=True):
        if part is not None:
            rows = part[state_indices[real].long()]
            assert_close({"state": rows}, {"state": ref[real]}, 1e-6 if case.state == torch.float32 else 3e-3)
    _assert_all_else_unchanged(storage, before, pool, state_indices[real].tolist())


def _assert_all_else_unchanged(storage: Tensor, before: Tensor, pool: State, written: list[int]) -> None:
    old = State(*(None if x is None else x.as_strided(x.shape, x.stride(), x.storage_offset()) for x in pool))
    for part in old:
        if part is not None:
            saved = before.as_strided(part.shape, part.stride(), part.storage_offset())
            assert not torch.equal(bits(part[written]), bits(saved[written]))
            part[written] = saved[written]
    assert torch.equal(bits(storage), bits(before))


def conv_step_arguments(
    dtype: torch.dtype, state: torch.dtype, layout: str, index_dtype: torch.dtype, device: Any = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [5, 300], weight [300, 4], pool [ROWS, 300, 3] and indices; NaN in what must not be used."""
    generator = torch.Generator().manual_seed(0)
    C, kept = 300, 3
    x, weight = torch.randn(5, C, generator=generator), torch.randn(C, kept + 1, generator=generator)
    state_indices = torch.tensor(INDICES, dtype=index_dtype)
    x[state_indices < 0] = torch.nan
    if layout == "[N, C, W - 1]":
        _, (pool,) = pages([(C, kept)], state, device, gap=5)
    elif layout == "[N, W - 1, C]":
        _, (turned,) = pages([(kept, C)], state, device, gap=5)
        pool = turned.transpose(1, 2)
    else:
        _, (turned,) = pages([(kept, 3 * C)], state, device, gap=5)
        pool = turned[..., C : 2 * C].transpose(1, 2)
    for index in INDICES:
        if index >= 0:
            pool[index] = torch.randn(C, kept, generator=generator).to(device, state)
    return x.to(device, dtype), weight.to(device, dtype), pool, state_indices.to(device)


def assert_conv_step_of_a_pool(
    function: Any,
    dtype: torch.dtype,
    state: torch.dtype,
    layout: str,
    index_dtype: torch.dtype,
    device: Any = "cpu",
) -> None:
    """The step equals a convolution of the gathered rows in float64, shifts those, and changes nothing else."""
    x, weight, pool, state_indices = conv_step_arguments(dtype, state, layout, index_dtype, device)
    real = state_indices >= 0
    written = state_indices[real].long()
    expected_pool = pool.clone()
    inputs = torch.cat([pool[written].double(), x[real].double().unsqueeze(2)], dim=2)
    expected_y = torch.nn.functional.silu((inputs * weight.double()).sum(2))
    expected_pool[written] = inputs[..., 1:].to(state)
    storage = torch.empty(0, dtype=state, device=device).set_(pool.untyped_storage())
    others = storage.clone()
    view = others.as_strided(pool.shape, pool.stride(), pool.storage_offset())
    view.copy_(expected_pool)
    y = function(x, weight, pool, state_indices)
    assert y.dtype == dtype and not y[~real].any()
    assert_close({"y": y[real]}, {"y": expected_y}, {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype])
    assert torch.equal(bits(storage), bits(others))
