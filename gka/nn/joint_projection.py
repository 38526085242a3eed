"""All projections of one input as one node of the graph, where the host would else need longer than the GPU.

    y_i = x W_i^T       dx = sum_i dy_i W_i       dW_i = dy_i^T x

Like `F.linear` of each under autocast, with fewer operations: one kernel casts the weights, the products add up dx
themselves, and those that give dW write float32 for float32 weights.

Legend: B batch, T time; a group is one weight or several below each other, whose product is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.autocast import autocast_dtype
from ..ops.transforms import gradients_with_graph, must_dispatch
from ..ops.triton import fused
from .projections import are_plain


def project_jointly(x: Tensor, groups: Sequence[Sequence[nn.Linear]]) -> list[Tensor] | None:
    """The outputs of all projections of x, without biases; None where they are to be called one by one.

    Args:
        x: [B, T, hidden].
        groups: projections whose outputs stand side by side. Those of large weights should be alone in theirs,
            because the weights of a group are copied.

    Returns:
        For each group [B, T, outputs of all], in the dtype of autocast or else of x; None off a GPU, for a single
        token, in traced calls and where a projection has an adapter, a hook or a quantised weight.
    """
    linears = list(chain(*groups))
    if x.shape[1] == 1 or x.numel() == 0 or not fused.enabled(x) or must_dispatch(x) or not are_plain(linears):
        return None
    if len({linear.weight.dtype for linear in linears}) > 1:
        return None
    dtype = autocast_dtype(x.device) or x.dtype
    weights = [linear.weight for linear in linears]
    outputs: tuple[Tensor, ...] = _Joint.apply(x, dtype, [len(group) for group in groups], *weights)  # type: ignore[no-untyped-call]
    return list(outputs)


class _Joint(torch.autograd.Function):
    """`project_jointly` of weights; its gradients of gradients are those of `F.linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, sizes: list[int], *weights: Tensor) -> Any:  # type: ignore[override]
        ctx.save_for_backward(x, *weights)
        ctx.dtype, ctx.sizes = dtype, sizes
        rows = x.to(dtype)
        return tuple(F.linear(rows, weight) for weight in _joined(weights, sizes, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (x, *weights), dtype, sizes = ctx.saved_tensors, ctx.dtype, ctx.sizes
        if torch.is_grad_enabled():  # create_graph=True

            def again(x: Tensor, *weights: Tensor) -> list[Tensor]:
                grouped = [torch.cat(group) for group in _groups(weights, sizes)]
                return [F.linear(x.to(dtype), weight.to(dtype)) for weight in grouped]

            dx, *found = gradients_with_graph(again, (x, *weights), gradients)
            return dx, None, None, *found
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in gradients]
        dx = _dx(x, dys, _joined(weights, sizes, dtype)) if ctx.needs_input_grad[0] else None
        found = [None] * len(weights)
        if any(ctx.needs_input_grad[3:]):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            products = [_product(dy.t(), rows, weights[0].dtype) for dy in dys]
            pairs = zip(products, _groups(weights, sizes), strict=True)
            found = [dW for product, group in pairs for dW in product.split([len(weight) for weight in group])]
        return dx, None, None, *found


def _groups(weights: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    rest = iter(weights)
    return [[next(rest) for _ in range(size)] for size in sizes]


def _joined(weights: Sequence[Tensor], sizes: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """The weights of each group below each other, in `dtype`; one alone that has it is not copied."""
    groups = _groups(weights, sizes)
    if weights[0].dtype == dtype:
        return [group[0] if len(group) == 1 else torch.cat(group) for group in groups]
    buffer = torch.empty(sum(map(len, weights)), weights[0].shape[1], dtype=dtype, device=weights[0].device)
    torch._foreach_copy_(list(buffer.split([len(weight) for weight in weights])), list(weights))
    return list(buffer.split([sum(map(len, group)) for group in groups]))


def _dx(x: Tensor, dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    first, *others = zip(dys, weights, strict=True)
    dx = first[0] @ first[1]
    for dy, weight in others:
        dx.addmm_(dy, weight)
    return dx.view(x.shape).to(x.dtype)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`; on a GPU the sums in float32 are not rounded first."""
    if dtype == left.dtype:
        return left @ right
    if left.is_cuda and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
