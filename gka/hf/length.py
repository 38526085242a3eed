"""The number of tokens in a cache: counted for models with GKA layers only, and compared with the call.

transformers asks an attention layer of the cache for the number of tokens (`generate` does so before every
prompt), and raises an error if there is none. For a model without attention, the cache gets one more layer at the
end: an attention layer of zero width, which counts the tokens and stores nothing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

_WINDOW = 2**62  # a window that never fills: only layers with a window count tokens apart from what they hold


def add_counter(cache: Cache) -> None:
    """Add the counting layer to a cache without attention layers."""
    if not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        cache.layers.append(DynamicSlidingWindowLayer(sliding_window=_WINDOW))


def count_tokens(cache: Cache, inputs_embeds: Tensor) -> None:
    """Count the tokens of [B, T, hidden_size] in the layer of `add_counter`."""
    nothing = inputs_embeds.new_empty(inputs_embeds.shape[0], 1, inputs_embeds.shape[1], 0)
    counter = cache.layers[-1]
    assert isinstance(counter, CacheLayerMixin)
    counter.update(nothing, nothing)


def check_mask_length(attention_mask: Tensor, cache: Cache | None, T: int) -> None:
    """ValueError if a mask [B, P + T] is for other tokens than the P that the cache holds and the T of the call.

    The length of a static cache is a tensor of the device. It is not read.
    """
    held = 0 if cache is None else cache.get_seq_length()
    if isinstance(held, Tensor) or attention_mask.shape[1] == held + T:
        return
    raise ValueError(
        f"attention_mask has shape {tuple(attention_mask.shape)}; expected [B, {held + T}]: "
        f"{held} tokens in past_key_values and {T} new ones"
    )


def check_prompt(tokens: int, cache: Any, columns: int) -> None:
    """ValueError if the input of `generate` does not go on from what the cache holds.

    Args:
        tokens: the length of input_ids or inputs_embeds.
        cache: a cache that counts tokens, or None.
        columns: of the attention_mask. With as many as tokens, the tokens are those in the cache and at least one
            more; with more columns they are the new ones alone.
    """
    held = 0 if cache is None else int(cache.get_seq_length())
    if held == 0:
        return
    if columns == tokens and tokens <= held:
        raise ValueError(
            f"the cache holds {held} tokens and the input has {tokens}; expected the tokens of the cache and at "
            "least one more: pass a copy.deepcopy(cache) that was made before, without the prompt's last token"
        )
    if columns not in (tokens, held + tokens):
        raise ValueError(
            f"attention_mask has {columns} columns, the cache holds {held} tokens and the input has {tokens}; "
            f"expected {held + tokens} columns for new tokens alone"
        )
