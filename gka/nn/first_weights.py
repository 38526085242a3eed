"""Initial weights of the layer.

    matrices       normal, standard deviation 1 / sqrt(hidden_size) or initializer_range
    convolutions   U(-1, 1) / sqrt(W), which keeps the size of the inputs
    A_log          log U(0, 16)                       dt_bias    softplus^{-1}(dt), log dt uniform
    biases, ZeroLinear    0                           norms      1

Legend: H query heads, Hk key/value heads, W width of the convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .projections import ZeroLinear
from .short_conv import ShortConv


def default_std(hidden_size: int) -> float:
    """The standard deviation with which a matrix of `hidden_size` inputs keeps the size of its input."""
    return hidden_size**-0.5


def residual_factor(blocks: int) -> float:
    """The factor of projections into the residual stream, for a model with `blocks` blocks (two per block)."""
    return 1 / math.sqrt(2 * blocks)


@torch.no_grad()
def fill(parameter: Tensor, with_values: Callable[[Tensor], object]) -> None:
    """Call `with_values` on a parameter, except if transformers has marked it as loaded from a checkpoint."""
    if not getattr(parameter, "_is_hf_initialized", False):
        with_values(parameter)


def fresh_A_log(heads: int, device: torch.device | None = None) -> Tensor:
    """Initial A_log, [heads] float32: log U(0, 16), without values near log 0."""
    return torch.empty(heads, device=device, dtype=torch.float32).uniform_(0.01, 16.0).log()


def fresh_dt_bias(heads: int, device: torch.device | None = None) -> Tensor:
    """Initial dt_bias, [heads] float32: softplus^{-1}(dt), dt log-uniform in [1e-3, 1e-1], at least 1e-4."""
    low, high, floor = math.log(1e-3), math.log(1e-1), 1e-4
    dt = torch.empty(heads, device=device, dtype=torch.float32).uniform_(low, high).exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def repeated_heads(heads: int, kv_heads: int, device: torch.device | None = None) -> Tensor:
    """[heads, kv_heads] float32 of ones and zeros: query head h reads key/value head h // (heads / kv_heads)."""
    return torch.eye(kv_heads, device=device).repeat_interleave(heads // kv_heads, dim=0)


@torch.no_grad()
def fill_layer(layer: Any) -> None:
    """Set the initial weights of a `GatedKalmaNet` in place."""
    std = default_std(layer.hidden_size) if layer.initializer_range is None else layer.initializer_range
    for module in layer.modules():
        if isinstance(module, ZeroLinear):
            fill(module.weight, nn.init.zeros_)
        elif isinstance(module, ShortConv):
            fill(module.weight, partial(nn.init.kaiming_uniform_, a=math.sqrt(5.0)))
        elif isinstance(module, nn.Linear):
            of_this = std * layer.output_factor if module is layer.o_proj else std
            fill(module.weight, partial(nn.init.normal_, std=of_this))
            if module.bias is not None:
                fill(module.bias, nn.init.zeros_)
    fill(layer.o_norm.weight, nn.init.ones_)
    if layer.a_proj is not None:
        heads, device = len(layer.A_log), layer.A_log.device  # of all processes that share the layer
        fill(layer.A_log, lambda _: layer.set_decay("A_log", fresh_A_log(heads, device)))
        fill(layer.dt_bias, lambda _: layer.set_decay("dt_bias", fresh_dt_bias(heads, device)))
    for mixing in (layer.k_rep, layer.v_rep):
        if mixing is not None:
            fill(mixing, lambda x: x.copy_(repeated_heads(layer.num_heads, layer.num_kv_heads, x.device)))
