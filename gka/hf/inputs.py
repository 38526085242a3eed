"""Arguments of the models besides tokens: masks, positions, keywords.

Legend: B batch, T time of this call, P tokens in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils import TransformersKwargs, is_tracing

from ..ops.checks import values_may_be_read
from .packing import Packing

_KNOWN_KEYWORDS = {*TransformersKwargs.__annotations__, *FlashAttentionKwargs.__annotations__}


def padding_mask(attention_mask: Tensor | None, T: int) -> Tensor | None:
    """The mask for GKA layers: the last T columns of a mask [B, P + T]; None if they surely have no padding.

    A mask without padding gives the same numbers and costs a little more time. Reading it would make a GPU wait,
    so on a GPU it is read only if the environment variable GKA_CHECK_VALUES is 1.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] < T:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; "
            f"expected [B, at least {T}], 0 for padding: a GKA layer cannot use a mask of pairs of tokens"
        )
    recent = attention_mask[:, -T:]
    if values_may_be_read(recent) and not is_tracing(recent) and bool((recent != 0).all()):
        return None
    return recent


def positions(
    inputs_embeds: Tensor,
    attention_mask: Tensor | dict[str, Any] | None,
    past_key_values: Cache | None,
    packing: Packing | None,
) -> Tensor:
    """Positions for the rotary embedding, [B or 1, T]; padding does not count."""
    if packing is not None:
        return packing.positions
    T = inputs_embeds.shape[1]
    seen = 0 if past_key_values is None else past_key_values.get_seq_length()
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and attention_mask.shape[1] == seen + T:
        return ((attention_mask != 0).long().cumsum(dim=1) - 1).clamp(min=0)[:, -T:]
    return (torch.arange(T, device=inputs_embeds.device) + seen).unsqueeze(0)


def check_keywords(kwargs: dict[str, Any]) -> None:
    """Raise TypeError for an unknown keyword, ValueError for a keyword with an impossible value."""
    for name in kwargs:
        if name not in _KNOWN_KEYWORDS:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal is False; expected True: a GKA layer sees the past only")
