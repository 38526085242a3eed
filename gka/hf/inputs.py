"""Arguments of the models besides tokens: masks, positions, keywords.

Legend: B batch, T time of this call, P tokens in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils import TransformersKwargs, is_tracing

from ..ops.checks import values_may_be_read
from ..ops.transforms import unwrapped
from .config import GKAConfig
from .packing import Packing, find_packing, find_packing_in_mask, refuse_packing

LOSS_KEYWORDS = ("num_items_in_batch", "shift_labels", "ignore_index")
_WITHOUT_MEANING = ("cache_position", "token_type_ids")  # older callers and tokenizers send them to every model
_KNOWN_KEYWORDS = {
    *TransformersKwargs.__annotations__,
    *FlashAttentionKwargs.__annotations__,
    *_WITHOUT_MEANING,
}
_AS_ROWS = "a cache has one state per row: pass the sequences as rows, padded, with an attention_mask"


def packing_of_call(
    config: GKAConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | dict[str, Any] | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    kwargs: dict[str, Any],
) -> Packing | None:
    """Where the sequences of a packed batch are, in whatever way the caller tells; None if every row is one.

    Raises:
        ValueError: two ways that do not go together, a packed batch with a cache, or a shape that does not fit.
    """
    B, T = inputs_embeds.shape[:2]
    told = [name for name in ("cu_seq_lens_q", "seq_idx") if kwargs.get(name) is not None]
    if told and attention_mask is not None:
        raise ValueError(f"{told[0]} and attention_mask are both given; leave padding out of a packed batch")
    if told and past_key_values is not None:
        raise ValueError(f"{told[0]} and past_key_values are both given; {_AS_ROWS}")
    if position_ids is not None and tuple(position_ids.shape) not in ((B, T), (1, T)):
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}; expected ({B}, {T}) or (1, {T})")
    if attention_mask is None and past_key_values is None:
        packing = find_packing((B, T), kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx"), position_ids)
    else:
        packing = _packing_with_mask_or_cache(attention_mask, position_ids, past_key_values, T)
    attention = config._attn_implementation or ""
    if packing is not None and B > 1 and config.has_attention and "flash" in attention:
        raise ValueError(f"a packed batch has {B} rows; {attention} takes 1: concatenate them")
    return packing


def _packing_with_mask_or_cache(
    attention_mask: Tensor | dict[str, Any] | None, position_ids: Tensor | None, cache: Cache | None, T: int
) -> Packing | None:
    by_kind = isinstance(attention_mask, dict)
    mask = attention_mask.get("linear_attention") if isinstance(attention_mask, dict) else attention_mask
    if T == 1 or (isinstance(attention_mask, dict) and "linear_attention" not in attention_mask):
        return None
    if mask is not None and (mask.ndim != 2 or mask.shape[1] < T):
        return None  # GKA layers refuse it; softmax attention takes a mask of pairs as it is
    recent = None if mask is None else mask[:, -T:]
    if recent is not None and cache is None and not by_kind:
        return find_packing_in_mask(recent, position_ids)
    refuse_packing(recent, position_ids, _AS_ROWS if cache is not None else "pass no masks by kind of layer")
    return None


def padding_mask(attention_mask: Tensor | None, T: int) -> Tensor | None:
    """The mask for GKA layers, bool: the last T columns of a mask [B, P + T]; None if they surely have no padding.

    A mask without padding gives the same numbers and costs a little more time. Reading it would make a GPU wait,
    so on a GPU it is read only if the environment variable GKA_CHECK_VALUES is 1.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected two dims, 0 for padding: "
            "a GKA layer cannot use a mask of pairs of tokens"
        )
    recent = attention_mask[:, -T:] != 0
    if values_may_be_read(recent) and not is_tracing(recent) and bool(unwrapped(recent).all()):
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


def check_keywords(kwargs: dict[str, Any], also: Sequence[str] = ()) -> None:
    """Raise TypeError for an unknown keyword, ValueError for a keyword with an impossible value.

    `cache_position` and `token_type_ids` have no effect, as in transformers' own models.
    """
    for name in kwargs:
        if name not in _KNOWN_KEYWORDS and name not in also:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal is False; expected True: a GKA layer sees the past only")
