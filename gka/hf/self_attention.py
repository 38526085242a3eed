"""A GKA layer in the place of softmax attention in a block of transformers' own models.

Their blocks call `hidden_states, _ = self.self_attn(hidden_states=..., position_embeddings=...,
attention_mask=..., past_key_values=..., **kwargs)`. `GKASelfAttention` takes this call:

    for block in model.model.layers[::2]:
        block.self_attn = GKASelfAttention(layer)

A mask [B, 1, T, P + T] of transformers says which tokens each query may see. Of a causal mask with padding, the
last row says which tokens are real. Any other mask has no meaning for a recurrent layer and is refused.

Legend: B batch, T time of this call, P tokens in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from ..nn.layer import GatedKalmaNet

_STATES = 3  # convolutions of q, k and v; the sums S_kk and S_kv fit into as many places
_WINDOW = 2**62  # a window that never fills: only layers with a window count tokens apart from what they hold
_REFUSED = (
    "attention_mask is not causal with padding; a GKA layer reads every real token of its row up to the present "
    "one. Give packed sequences by cu_seq_lens_q"
)


class GKASelfAttention(nn.Module):
    """A GKA layer that is called as `self_attn` of transformers' blocks is.

    Args:
        layer: the GKA layer. Its `layer_idx` must be the block's number for a cache to be used.
    """

    def __init__(self, layer: GatedKalmaNet) -> None:
        super().__init__()
        self.gka = layer

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mix the tokens of every row, each with its past.

        Args:
            hidden_states: [B, T, hidden_size].
            attention_mask: None; [B, P + T], 0 for a pad; or [B, 1, T, P + T], true or 0 where a query sees a key.
                It must be causal with padding.
            past_key_values: a `DynamicCache`. The layer keeps its state there, in place of keys and values, and
                counts the tokens. `cache` is another name of it.
            cu_seq_lens_q: [N + 1] int32 or int64, where the sequences of a packed batch of one row begin.
            **kwargs: positions, their embeddings and what else the model hands to softmax attention: a GKA layer
                has no use for them.

        Returns:
            [B, T, hidden_size], and None in place of attention weights.

        Raises:
            TypeError, ValueError: a mask that is not causal with padding, a cache of another kind, or one that
                holds keys and values for this layer.
        """
        cache = kwargs.get("cache") if past_key_values is None else past_key_values
        B, T = hidden_states.shape[:2]
        held = None if cache is None else self._held(cache)
        seen = 0 if held is None else held.get_seq_length()
        mask = None if attention_mask is None else real_tokens(attention_mask, T, seen)
        y: Tensor = self.gka(hidden_states, mask, cache, cu_seq_lens_q)
        if held is not None:  # transformers asks the first layer how many tokens there are
            nothing = hidden_states.new_empty(B, 1, T, 0)
            held.update(nothing, nothing)
        return y, None

    def _held(self, cache: Cache) -> LinearAttentionAndSlidingWindowAttentionLayer:
        """The cache's layer for this one: on the first call it takes the place of that for keys and values."""
        if not isinstance(cache, Cache):
            raise TypeError(f"past_key_values is a {type(cache).__name__}; expected a transformers.Cache")
        index: int | None = self.gka.layer_idx
        if index is None:
            raise ValueError("the GKA layer has no layer_idx, which a cache needs; expected the block's number")
        held = cache.layers[index] if index < len(cache.layers) else None
        if isinstance(held, LinearAttentionAndSlidingWindowAttentionLayer):
            return held
        if isinstance(held, LinearAttentionCacheLayerMixin) or getattr(held, "is_compileable", False):
            raise ValueError(f"past_key_values has a {type(held).__name__} at {index}; expected a DynamicCache")
        if held is not None and held.is_initialized:
            raise ValueError(f"past_key_values holds keys and values at {index}, where a GKA layer now is")
        new = LinearAttentionAndSlidingWindowAttentionLayer(sliding_window=_WINDOW, number_of_states=_STATES)
        while len(cache.layers) <= index:
            if cache.layer_class_to_replicate is None:
                raise ValueError(f"past_key_values has {len(cache.layers)} layers; expected one at {index}")
            cache.layers.append(cache.layer_class_to_replicate())
        cache.layers[index] = new
        return new


def real_tokens(attention_mask: Tensor, T: int, seen: int) -> Tensor:
    """Which of the last T tokens are real, [B, T] of bool, from a mask of transformers.

    Args:
        attention_mask: [B, P + T], or [B, 1, T, P + T] of bool or of numbers to be added to scores.
        T: tokens of this call.
        seen: P.

    Raises:
        TypeError, ValueError: it is not causal with padding. On a GPU the comparison does not wait, and the error
            is the device's.
    """
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask is a {type(attention_mask).__name__}; expected a torch.Tensor")
    if attention_mask.ndim == 2 and attention_mask.shape[1] >= T:
        return attention_mask[:, -T:] != 0
    B, keys = attention_mask.shape[0], seen + T
    if attention_mask.ndim != 4 or tuple(attention_mask.shape[1:]) != (1, T, keys):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected [B, {keys}] or [B, 1, {T}, {keys}]"
        )
    visible = attention_mask[:, 0]
    if visible.dtype != torch.bool:
        visible = visible > torch.finfo(visible.dtype).min / 2
    real = visible[:, -1]
    place = torch.arange(keys, device=visible.device)
    expected = (place <= place[seen:, None]) & real[:, None, :]
    # Attention fills rows that see nothing, those of pads on the left, in one way or another.
    filled = visible.all(-1, keepdim=True) & ~expected.any(-1, keepdim=True)
    fits = (visible == expected) | filled
    if visible.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(fits.all()):
            raise ValueError(_REFUSED)
    else:
        torch._assert_async(fits.all(), _REFUSED)
    return real[:, seen:].expand(B, T)
