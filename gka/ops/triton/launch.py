"""Launching kernels, and compiling all of a call's kernels side by side before its first.

One after the other, a dozen kernels take ptxas a good twenty seconds. Compiling ahead walks through the launcher
with stand-ins for the tensors: every launch on the way is handed to a thread that compiles, and nothing is run.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from .prepared import PreparedKernel

_AHEAD: ContextVar[bool] = ContextVar("gka_compiling_ahead", default=False)
THREADS = 16  # a training step has 16 kernels


def can_compile_side_by_side() -> bool:
    """Whether this Triton has what `side_by_side` needs (from 3.6 on)."""
    mode = getattr(triton, "AsyncCompileMode", None)
    return mode is not None and "ignore_errors" in inspect.signature(mode).parameters


def compiling_ahead() -> bool:
    """Whether launches are compiled instead of run."""
    return _AHEAD.get()


def or_stand_in(kk: Tensor | None, kv: Tensor | None) -> Tensor | None:
    """S_kk's tensor for a kernel that chooses between its pointer and S_kv's: where there is none, the latter."""
    return kv if kk is None else kk


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the current GPU: make it that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


_prepared: dict[int, PreparedKernel] = {}  # by the kernel's id


def launch(kernel: Any, programs: int, **named: Any) -> None:
    """Run `programs` programs of a kernel, if any, or compile it."""
    if not programs:
        return
    named.setdefault("enable_fp_fusion", True)  # Triton is about to change its default
    if _AHEAD.get():
        kernel.warmup(grid=(programs,), **named)
    elif (prepared := _prepared.get(id(kernel))) is not None:
        prepared.run(programs, named)
    elif type(kernel) is JITFunction:
        _prepared[id(kernel)] = PreparedKernel(kernel)
        _prepared[id(kernel)].run(programs, named)
    else:  # Triton's interpreter
        kernel.run(grid=(programs,), warmup=False, **named)


@contextmanager
def side_by_side() -> Iterator[None]:
    """Launches inside are compiled in threads; done when left. What does not compile says so when it is run."""
    threads = min(THREADS, os.cpu_count() or 1)
    token = _AHEAD.set(True)
    try:
        with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            yield
    finally:
        _AHEAD.reset(token)
