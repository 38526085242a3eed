"""What a request keeps in a GKA layer: shapes and dtypes of its states, for one process of several.

S_kk and S_kv lie before the inputs of the convolutions, because those have 16 bits: so all are aligned.

Legend: H query heads, Hk key/value heads, D head dim, W width of the convolutions.
"""

from __future__ import annotations

from typing import Any

import torch

# As vLLM names them.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def conv_width(config: Any) -> int:
    """W, at least 2: a convolution of width 1 keeps a tap of weight zero."""
    return max(int(config.conv_size), 2)


def state_shapes(config: Any, ranks: int) -> tuple[tuple[int, ...], ...]:
    """[H, D, D] (if the mixer solves), [H, D, D], [W - 1, channels]: of the heads of one of `ranks` processes."""
    D, H, Hk = config.head_dim, config.num_attention_heads // ranks, max(config.num_key_value_heads // ranks, 1)
    channels = (H + (2 if config.use_v_conv else 1) * Hk) * D
    sums = 2 if config.mixer == "gka" else 1
    return (*((H, D, D),) * sums, (conv_width(config) - 1, channels))


def state_dtypes(config: Any, vllm_config: Any) -> tuple[torch.dtype, ...]:
    """Their dtypes: sums float32 or bfloat16 (--mamba-ssm-cache-dtype), inputs as --mamba-cache-dtype says."""
    cache = vllm_config.cache_config
    wide = DTYPES["float32" if cache.mamba_ssm_cache_dtype == "auto" else cache.mamba_ssm_cache_dtype]
    conv = vllm_config.model_config.dtype
    if cache.mamba_cache_dtype != "auto":
        conv = DTYPES[cache.mamba_cache_dtype]
    return (*(wide,) * (2 if config.mixer == "gka" else 1), conv)
