"""Products with 16-bit tensors and float32 sums, for running sums, whose error must stay below that of the op.

On a GPU each operand is one or two bfloat16 tensors, 16 bits of each number, and the sums are float32. The setting
of TF32 has no effect on such products. For 32-bit inputs `torch.set_float32_matmul_precision` counts, as for the
op in PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, wide: torch.dtype, in_parts: bool) -> Tensor:
    """a b, [n, i, j] times [n, j, k] -> [n, i, k] in the dtype `wide`.

    in_parts: multiply bfloat16 parts, but not the lower part of a with that of b.
    """
    if not in_parts:
        return torch.bmm(a.to(wide), b.to(wide))
    (a_high, *a_low), (b_high, *b_low) = bfloat16_parts(a), bfloat16_parts(b)
    pairs = [(a_high, b_high), *((low, b_high) for low in a_low), *((a_high, low) for low in b_low)]
    # One product of parts side by side, not a sum of products, where they are shorter than the result.
    if a.shape[2] <= b.shape[2]:
        left, right = zip(*pairs, strict=True)
        pairs = [(torch.cat(left, 2), torch.cat(right, 1))]
    total = _float32_bmm(*pairs[0])
    for pair in pairs[1:]:
        total += _float32_bmm(*pair)
    return total


def bfloat16_parts(x: Tensor) -> list[Tensor]:
    """bfloat16 tensors whose sum is x, exactly for 16 bits, to 16 bits of each number for float32.

    The first part is the upper half of the bits of x. A compiler would take x for x rounded and widened again.
    """
    if x.dtype == torch.bfloat16:
        return [x]
    x = x.float()
    transposed = x.stride(-1) != 1
    if transposed:
        x = x.mT
    high = x.contiguous().view(torch.bfloat16)[..., 1::2].contiguous()
    parts = [high, torch.sub(x, high, out=torch.empty_like(high))]
    return [part.mT for part in parts] if transposed else parts


def _float32_bmm(a: Tensor, b: Tensor) -> Tensor:
    if a.device.type == "cuda":
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())
