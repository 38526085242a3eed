"""The number of tokens in a cache, for models with GKA layers only.

transformers asks an attention layer of the cache for the number of tokens (`generate` does so before every
prompt), and raises an error if there is none. For a model without attention, the cache gets one more layer at the
end: an attention layer of zero width, which counts the tokens and stores nothing.
"""

from __future__ import annotations

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
