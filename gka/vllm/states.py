"""What a request keeps in a GKA layer: shapes and dtypes of its states, for one process of several.

S_kk and S_kv lie before the inputs of the convolutions, which may have 16 bits. The channels of those are a
multiple of 8, so all states of all requests are aligned.

Legend: H query heads, Hk key/value heads, D head dim, W width of the convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_DECAY = 0.01  # of a head, per token, that states in bfloat16 need (docs/reliability.md)
# As vLLM names them.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def conv_width(config: Any) -> int:
    """W, at least 2: a convolution of width 1 keeps a tap of weight zero."""
    return max(int(config.conv_size), 2)


def state_shapes(config: Any, ranks: int) -> tuple[tuple[int, ...], ...]:
    """[H, D, D] (if the mixer solves), [H, D, D], [W - 1, channels]: of the heads of one of `ranks` processes."""
    D, H, Hk = config.head_dim, config.num_attention_heads // ranks, max(config.num_key_value_heads // ranks, 1)
    channels = -(-(H + (2 if config.use_v_conv else 1) * Hk) * D // 8) * 8
    sums = 2 if config.mixer == "gka" else 1
    return (*((H, D, D),) * sums, (conv_width(config) - 1, channels))


def state_dtypes(config: Any, vllm_config: Any) -> tuple[torch.dtype, ...]:
    """Their dtypes: sums float32 or bfloat16 (--mamba-ssm-cache-dtype), inputs as --mamba-cache-dtype says."""
    cache = vllm_config.cache_config
    conv = vllm_config.model_config.dtype
    if cache.mamba_cache_dtype != "auto":
        conv = DTYPES[cache.mamba_cache_dtype]
    return (*(sum_dtype(cache),) * (2 if config.mixer == "gka" else 1), conv)


def sum_dtype(cache_config: Any) -> torch.dtype:
    """The dtype of S_kk and S_kv that vLLM's configuration of the cache asks for."""
    name = cache_config.mamba_ssm_cache_dtype
    return DTYPES["float32" if name == "auto" else name]


def weak_heads(A_log: Tensor, dt_bias: Tensor) -> int:
    """How many heads decay too little for states in bfloat16, at a token whose projection is 0. It waits for
    the device.

    Args:
        A_log, dt_bias: [H] each.
    """
    decay = A_log.float().exp() * F.softplus(dt_bias.float())
    return int((decay < LEAST_DECAY).sum())
