"""Linear maps of the layer: a map that starts at zero, a low-rank map, and small maps that share one product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

# The parts of a layer whose outputs belong to heads.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "g_proj", "a_proj", "b_proj", "alpha_proj")
CONVOLUTIONS = ("q_conv1d", "k_conv1d", "v_conv1d")


class ZeroLinear(nn.Linear):
    """A linear map whose weights start at zero."""


class LowRank(nn.Module):
    """y = SiLU(x A^T) B^T.

    Args:
        inputs, rank, outputs: sizes of x, of the inner vector, and of y.
        **place: device and dtype.
    """

    def __init__(self, inputs: int, rank: int, outputs: int, **place: Any) -> None:
        super().__init__()
        self.linearA = nn.Linear(inputs, rank, bias=False, **place)
        self.linearB = ZeroLinear(rank, outputs, bias=False, **place)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        y: Tensor = self.linearB(F.silu(self.linearA(x)))
        return y


def expand_heads(
    x: Tensor, heads: int, low_rank: nn.Module, mixing: Tensor | None, every: Tensor | None = None
) -> Tensor:
    """Keys or values of every query head: [..., Hk, D] -> [..., H, D].

    Args:
        x: keys or values.
        heads: H, a multiple of Hk.
        low_rank: maps all heads, [..., Hk D] -> [..., H D].
        mixing: [H, Hk], the learned mixtures that it is added to; None means the repeated heads.
        every: if x has the heads of one of several processes, those of all; then `low_rank` and `mixing` read all,
            and make the query heads of this process. None means x.
    """
    every = x if every is None else every
    if mixing is None:
        residual = x.repeat_interleave(heads // x.shape[-2], dim=-2)
    else:
        residual = torch.einsum("hk,...kd->...hd", mixing.to(x.dtype), every)
    expanded: Tensor = residual + low_rank(every.flatten(-2)).unflatten(-1, (-1, x.shape[-1]))
    return expanded


def is_plain(module: nn.Linear | nn.Conv1d, kind: type[nn.Module]) -> bool:
    """Whether only weight and bias decide the output: no adapter, quantised weight, hook or offloading."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if type(module) is not kind or any(hooks) or _has_any_global_hook() or "forward" in module.__dict__:
        return False
    return all(type(x) in (nn.Parameter, Tensor) for x in (module.weight, module.bias) if x is not None)


def are_plain(projections: list[nn.Linear]) -> bool:
    """Whether weights and biases alone decide the outputs of all."""
    return all(is_plain(linear, nn.Linear) for linear in projections)


def bias_of(linear: nn.Linear) -> Tensor:
    """The bias, zeros if there is none."""
    return linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias


def project_as_one(x: Tensor, projections: list[nn.Linear]) -> Tensor:
    """The outputs of small plain projections of x [B, T, hidden], without biases, side by side in the last dim.

    Large projections are not for this, because the weights are copied.
    """
    return F.linear(x, torch.cat([linear.weight for linear in projections]))


def project(x: Tensor, *projections: nn.Linear | None) -> list[Tensor | None]:
    """The outputs of several small projections of x [B, T, hidden]; None for None.

    Together they read x once and add to its gradient once. At hidden size 2048, reading x costs more than the
    arithmetic of the few columns.
    """
    given = [linear for linear in projections if linear is not None]
    if len(given) < 2 or x.shape[1] == 1 or not are_plain(given):
        return [None if linear is None else linear(x) for linear in projections]
    out = F.linear(x, torch.cat([linear.weight for linear in given]), torch.cat(list(map(bias_of, given))))
    parts = iter(out.split([p.out_features for p in given], dim=2))
    return [None if linear is None else next(parts) for linear in projections]
