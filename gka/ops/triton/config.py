"""Block sizes, warps and pipeline stages of the kernels: a small table, no autotuning.

Only dtype, head dims and the GPU's architecture choose, never a batch size or a length: a new length compiles
nothing.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Largest key dim: above, the solve's operands would not fit into shared memory.
MAX_DIM = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Shorter chunks have narrow products (see `_power_of_two`); through the interpreter they make short tests.
CHUNK_SIZES = (16, 32, 64) if INTERPRETED else (64,)


def constant_when_compiled(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, without its import of the compiler, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Config:
    """wide: whether products take float32 operands; narrow_solve: those of the solve are bfloat16 all the same;
    BD, BV: blocks of D and V; tile: of a state in `scan_states`, span_tile where it only sums;
    half: columns of `increments_kk`; rows, wide_row: tile of `scan_gradients`; query_rows: of `query_gradients`;
    pipeline: chunks on their way in `scan_states`; local_pipeline, read_pipeline: pieces on their way in `local`
    and in the readers; o_columns, dy_columns: of V at a time in `read_states` and `read_gradients`.

    The others: num_warps and num_stages, by kernel.
    """

    wide: bool
    narrow_solve: bool
    BD: int
    BV: int
    tile: tuple[int, int]
    span_tile: tuple[int, int]
    half: int
    rows: int
    wide_row: int
    query_rows: int
    pipeline: int
    local_pipeline: int
    read_pipeline: int
    o_columns: int
    dy_columns: int
    scan: dict[str, int]
    spans: dict[str, int]
    solve: dict[str, int]
    read: dict[str, int]
    rowwise: dict[str, int]
    gradients: dict[str, int]
    increments_kk: dict[str, int]
    increments: dict[str, int]
    local: dict[str, int]


def _power_of_two(n: int) -> int:
    """At least 64: Triton 3.6 multiplies wrongly on Hopper where a product has 16 or 32 columns."""
    return max(64, 1 << (n - 1).bit_length())


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype != torch.bfloat16


def supports(dtype: torch.dtype, D: int, chunk_size: int | None) -> bool:
    """Whether there are kernels for inputs of this dtype, key dim and chunk size."""
    return D <= MAX_DIM.get(dtype, 0) and (chunk_size is None or chunk_size in CHUNK_SIZES)


def fast_inputs(supported: Callable[[torch.dtype, int], bool]) -> str:
    """The dtypes with the largest key dim that `supported` accepts, in words.

    >>> fast_inputs(lambda dtype, D: D <= (128 if dtype == torch.bfloat16 else 64))
    'bfloat16 with D up to 128, float16 or float32 with D up to 64'
    """
    names: dict[int, list[str]] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        largest = max((D for D in range(1, 1025) if supported(dtype, D)), default=0)
        if largest:
            names.setdefault(largest, []).append(str(dtype).removeprefix("torch."))
    return ", ".join(f"{' or '.join(dtypes)} with D up to {D}" for D, dtypes in names.items())


@constant_when_compiled
def runs_kernels(device: int | None) -> bool:
    """Whether there is Triton, and a CUDA device that the kernels are for: NVIDIA's from capability 8.0 on."""
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; off a GPU, where kernels are interpreted or compiled ahead, that of Hopper."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def config_for(dtype: torch.dtype, D: int, V: int, chunk_size: int, capability: tuple[int, int]) -> Config:
    """Raises ValueError for what `supports` denies.

    From compute capability 9.0 on a group of 4 warps multiplies 64 rows at once, and operands come from shared
    memory; before, they all pass through registers, which 8 warps have twice as many of.
    """
    if not supports(dtype, D, chunk_size):
        raise ValueError(
            f'backend "triton" has no kernels for {dtype}, D = {D}, chunk_size = {chunk_size}; expected '
            f"{fast_inputs(lambda dtype, D: supports(dtype, D, None))}, and chunk_size {CHUNK_SIZES[-1]}; "
            'backend "chunked" takes all'
        )
    wide = _is_wide(dtype)
    BD, BV = _power_of_two(D), min(64 if wide else 128, _power_of_two(V))
    hopper = capability >= (9, 0)
    ahead = capability[0] == 9 and not wide  # loads to shared memory run ahead of the products
    few, many = {"num_warps": 4, "num_stages": 1}, {"num_warps": 8, "num_stages": 1}
    three = {**few, "maxnreg": 168}  # so many programs share a multiprocessor
    return Config(
        wide=wide,
        narrow_solve=wide and BD > 64,
        BD=BD,
        BV=BV,
        tile=(64, 64),
        span_tile=(BD, 64) if hopper and not wide else (64, 64),
        half=BD if hopper and not (wide and BD > 64) else 64,
        rows=8,
        wide_row=_power_of_two(max(D, V)),
        query_rows=16,
        pipeline=3,
        local_pipeline=3 if ahead else 1,
        read_pipeline=2 if ahead else 1,
        o_columns=64 if hopper else BV,
        dy_columns=64,
        scan=three if hopper else few,
        spans=few,
        solve=few if hopper else many,
        read=few if hopper else many,
        rowwise=few,
        gradients=many,
        increments_kk={**many, "maxnreg": 128} if hopper else few,
        increments={**many, "maxnreg": 128} if hopper else few,
        local=few if hopper else many,
    )


def supports_step(dtype: torch.dtype, D: int) -> bool:
    """Whether there is a kernel of a decode step for inputs of this dtype and key dim."""
    return dtype != torch.float64 and D <= 128


def step_config(dtype: torch.dtype, D: int, V: int) -> dict[str, int]:
    """Blocks, groups of rows and warps of `step_token` with states of `dtype`.

    A thread loads 16 bytes of a row; a group is the rows of neighbouring threads that load one row together. With
    4 warps for 128 x 128 a thread holds 128 numbers of a state, and two programs share a multiprocessor: one
    solves while the other waits for memory.
    """
    BD, BV = (max(16, min(128, 1 << (n - 1).bit_length())) for n in (D, V))
    num_warps = max(1, BD // 32)
    threads, at_once = 32 * num_warps, 4 if dtype == torch.float32 else 8

    def groups(columns: int) -> int:
        return max(1, min(BD, threads * at_once // columns))

    return {
        "BD": BD, "BV": BV,
        "G_KK": groups(BD), "LOG_KK": groups(BD).bit_length() - 1,
        "G_KV": groups(BV), "LOG_KV": groups(BV).bit_length() - 1,
        "num_warps": num_warps, "num_stages": 1,
    }  # fmt: skip


@dataclass(frozen=True)
class SpanConfig:
    """BD, BV: blocks of D and V; tokens: at a time in `add_tokens`, rows: in `token_gradients`; piece: tokens of a
    program of `add_tokens`, at least, and pieces: how many there are, at most; scalars: tokens at a time in
    `weigh_tokens` and `gate_gradients`, whose blocks are summed `blocks` at a time; pipeline: loads on their way.
    """

    BD: int
    BV: int
    tokens: int = 64
    rows: int = 128
    piece: int = 2048
    pieces: int = 64
    scalars: int = 1024
    blocks: int = 128
    pipeline: int = 3
    warps: int = 8


def span_config(D: int, V: int) -> SpanConfig:
    """Sizes of the kernels that sum a span of tokens; through the interpreter short ones."""
    BD, BV = (max(64, 1 << (n - 1).bit_length()) for n in (D, V))
    if INTERPRETED:
        return SpanConfig(BD, BV, tokens=16, rows=16, piece=32, pieces=3, scalars=16, blocks=2)
    return SpanConfig(BD, BV)


def conv_config(C: int, rows: int) -> dict[str, int]:
    """Rows at a time, channels and warps of a program of the short convolution: 4 channels a thread."""
    BC = max(32, min(256, 1 << (C - 1).bit_length()))
    return {"R": rows, "BC": BC, "num_warps": max(1, BC // 128), "num_stages": 1}


def norm_config(V: int, numbers: int) -> dict[str, int]:
    """Rows and warps of a program of the gated norm: `numbers` numbers of a tensor or one row, 8 a thread."""
    BV = max(16, 1 << (V - 1).bit_length())
    R = max(1, numbers // BV)
    return {"R": R, "BV": BV, "num_warps": max(1, min(32, R * BV // 256)), "num_stages": 1}


def gates_config(H: int) -> dict[str, int]:
    """Rows and warps of a program of the gates: 1024 numbers of each gate or one row, 8 a thread."""
    BH = 1 << (H - 1).bit_length()
    return {"R": max(1, 1024 // BH), "BH": BH, "num_warps": max(4, min(32, BH // 256)), "num_stages": 1}
