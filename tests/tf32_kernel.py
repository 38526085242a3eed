"""A kernel that writes the two parts of float32 numbers in TF32; imported only where Triton is installed."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from gka.ops.triton.kernels.arithmetic import _tf32_parts


@triton.jit
def write_parts(x_ptr: Any, hi_ptr: Any, lo_ptr: Any) -> None:
    """1024 numbers."""
    places = tl.arange(0, 1024)
    hi, lo = _tf32_parts(tl.load(x_ptr + places))
    tl.store(hi_ptr + places, hi)
    tl.store(lo_ptr + places, lo)
