"""Exchanges between the ranks of a group, with gradients.

    all_gather     y_j = x_j                     dx_r = sum over ranks of dy_r
    all_reduce     y = sum over ranks of x_r     dx_r = sum over ranks of dy

The function that is differentiated is the sum of what all ranks compute. One collective runs forwards and one
backwards, on every rank, so every rank must run the backward pass. Nothing waits for a GPU: the collectives are
queued on its streams.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# PyTorch 2.13 renamed both, and warns of the earlier names.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks, [n, ...], from one of the same shape and dtype on each."""
    gathered: Tensor = _AllGather.apply(x, group)
    return gathered


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the tensors of all ranks, which have the same shape and dtype."""
    total: Tensor = _AllReduce.apply(x, group)
    return total


def refuse_second_derivatives() -> None:
    """RuntimeError in a backward pass that is to be differentiated again; `once_differentiable` may miss it."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "create_graph is True; expected False: exchanges between processes have first derivatives alone"
        )


def gathered_pieces(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks, [n, ...], without a gradient."""
    size = dist.get_world_size(group)
    gathered = x.new_empty(size * x.numel())
    _gather_into(gathered, x.contiguous().view(-1), group=group)
    return gathered.view(size, *x.shape)


def scattered_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's entry of the sum over ranks of x [n, ...], without a gradient."""
    entry = x.new_empty(x[0].numel())
    _reduce_scatter_into(entry, x.contiguous().view(-1), group=group)
    return entry.view(x.shape[1:])


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered_pieces(x, group)

    @staticmethod
    def backward(ctx: Any, d_gathered: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivatives()
        return scattered_sum(d_gathered, ctx.group), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivatives()
        dx = d_total.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(dx, group=ctx.group)
        return dx, None
