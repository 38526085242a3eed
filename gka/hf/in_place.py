"""A GKA layer as `self_attn` in the blocks of any transformers model, without a change to the model's code.

    for index in (1, 3):
        layer = GatedKalmaNet(config.hidden_size, num_heads=4, layer_idx=index)
        model.model.layers[index].self_attn = InPlaceOfAttention(layer)

A block passes the mask of transformers, which for softmax attention has an entry for each pair of tokens. A GKA
layer reads the whole past, so it accepts such a mask only if it is causal with padding. Other masks are an error.

In the cache of the model, the layer is stored like transformers' layers with both linear and softmax attention:
the states, and `keys` with one dim that tell the real tokens. The model counts its tokens by these keys.

Legend: B batch, T time of this call, P tokens in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionAndFullAttentionLayer

from ..nn.layer import GatedKalmaNet
from ..nn.padding import check_mask
from ..ops.checks import require
from .cache_name import takes_cache
from .inputs import LOSS_KEYWORDS, check_keywords
from .packing import refuse_packing

_STATES = 3  # of convolutions, of q, k and v


class InPlaceOfAttention(nn.Module):
    """A `GatedKalmaNet` with the interface of `self_attn` in blocks such as those of Llama or Qwen3.

    Args:
        layer: the layer; its layer_idx must be the number of the block.

    Raises:
        ValueError: the layer has no layer_idx.
    """

    def __init__(self, layer: GatedKalmaNet) -> None:
        super().__init__()
        if layer.layer_idx is None:
            raise ValueError("layer.layer_idx is None; expected the number of the block")
        self.layer, self.layer_idx = layer, layer.layer_idx

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mix the tokens of every row, each with its past.

        Args:
            hidden_states: [B, T, hidden_size].
            position_embeddings: not needed: the layer knows the order of tokens without.
            attention_mask: None, [B, P + T] with 0 for padding, or [B or 1, 1, T, P + T] bool or additive, causal
                except for padding.
            past_key_values: the model's cache, a DynamicCache.
            **kwargs: what blocks and models of transformers hand on; cu_seq_lens_q tells packed sequences.
                position_ids are read to refuse those of a packed batch that is told in no other way.

        Returns:
            [B, T, hidden_size], and None for the attention weights.

        Raises:
            TypeError, ValueError: the mask is another, a keyword asks the impossible, or the cache has no place
                for the layer. On a GPU a mask with other values ends in an assertion of the device.
        """
        check_keywords(kwargs, also=("use_cache", *LOSS_KEYWORDS))  # what blocks hand on
        held = None if past_key_values is None else self._place_in(past_key_values)
        past = None if held is None or not held.is_initialized else held.keys[:, 0, :, 0]
        real = self._real_tokens(attention_mask, hidden_states, past)
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        if cu_seqlens is not None:
            return self.layer(hidden_states, real, past_key_values, cu_seqlens), None
        if kwargs.get("seq_idx") is not None:
            raise ValueError("seq_idx is given without cu_seq_lens_q; expected both, or rows of one sequence each")
        refuse_packing(real, kwargs.get("position_ids"), "pass cu_seq_lens_q, or rows of one sequence each")
        out = self.layer(hidden_states, real, past_key_values)
        if held is not None:
            known = (
                hidden_states.new_ones(hidden_states.shape[:2]) if real is None else real.to(hidden_states.dtype)
            )
            held.update(known[:, None, :, None], known[:, None, :, None])
        return out, None

    def _place_in(self, cache: Cache) -> Any:
        """The layer's own layer of the cache, made in place of an unused one."""
        while len(cache.layers) <= self.layer_idx:
            cache.layers.append(DynamicLayer())
        held: Any = cache.layers[self.layer_idx]
        if type(held) is LinearAttentionAndFullAttentionLayer:
            return held
        if not isinstance(held, DynamicLayer) or held.is_initialized:
            raise ValueError(
                f"past_key_values has a {type(held).__name__} at {self.layer_idx}; expected an unused layer of a "
                "DynamicCache, which grows"
            )
        cache.layers[self.layer_idx] = LinearAttentionAndFullAttentionLayer(number_of_states=_STATES)
        return cache.layers[self.layer_idx]

    def _real_tokens(self, mask: Any, x: Tensor, past: Tensor | None) -> Tensor | None:
        """[B, T] bool, False for padding; None without a mask."""
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise TypeError(f"attention_mask is a {type(mask).__name__}; expected None or a torch.Tensor")
        (B, T), P = x.shape[:2], 0 if past is None else past.shape[1]
        if mask.ndim == 2 and tuple(mask.shape) == (B, P + T):
            check_mask(mask[:, P:], "pass cu_seq_lens_q for packed sequences")
            return mask[:, P:] != 0
        if mask.ndim != 4 or mask.shape[0] not in (1, B) or tuple(mask.shape[1:]) != (1, T, P + T):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; expected ({B}, {P + T}) or ({B}, 1, {T}, {P + T})"
            )
        sees = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].expand(B, T, P + T)
        real = sees[:, -1]  # the last token sees all real tokens
        causal = torch.ones(T, P + T, dtype=torch.bool, device=x.device).tril(P)
        expected = causal & real.unsqueeze(1)
        # Padding does not see itself, or sees everything (transformers does this if it would see nothing).
        own = sees[:, :, P:].diagonal(dim1=1, dim2=2)
        pad = ~real[:, P:] & (~own | sees.all(dim=2))
        fits = ((sees == expected) | pad.unsqueeze(2)).all()
        if past is not None:
            fits = fits & (real[:, :P] == (past != 0)).all()
        require(
            fits,
            "attention_mask has values of another kind; expected a causal mask with padding: a GKA layer sees all "
            "tokens before its own",
        )
        return real[:, P:]
