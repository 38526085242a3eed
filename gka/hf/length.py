"""How many tokens a cache has seen, for models of GKA layers alone.

transformers asks an attention layer of the cache how many tokens it holds (`generate` does so before every
prompt), and raises if there is none. Behind the layers of a model without attention, the cache gets one more: an
attention layer of zero width, which counts the tokens and holds no bytes.
"""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

_WINDOW = 2**62  # a window that never fills: only layers with a window count tokens apart from what they hold


def add_counter(cache: Cache) -> None:
    """Give a cache without any attention layer the layer that counts."""
    if not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        cache.layers.append(DynamicSlidingWindowLayer(sliding_window=_WINDOW))


def count_tokens(cache: Cache, inputs_embeds: Tensor) -> None:
    """Count the tokens of [B, T, hidden_size] in the layer that `add_counter` gave."""
    nothing = inputs_embeds.new_empty(inputs_embeds.shape[0], 1, inputs_embeds.shape[1], 0)
    counter = cache.layers[-1]
    assert isinstance(counter, CacheLayerMixin)
    counter.update(nothing, nothing)
