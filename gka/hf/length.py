"""The number of tokens in a cache: counted for models with GKA layers only, and compared with the call.

transformers asks an attention layer of the cache for the number of tokens (`generate` does so before every
prompt), and raises an error if there is none. For a model without attention, the cache gets one more layer at the
end: an attention layer of zero width, which counts the tokens and stores nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

_WINDOW = 2**62  # a window that never fills: only layers with a window count tokens apart from what they hold


def add_counter(cache: Cache) -> None:
    """Add the counting layer to a cache without attention layers."""
    if not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        cache.layers.append(DynamicSlidingWindowLayer(sliding_window=_WINDOW))


def count_tokens(cache: Cache, inputs_embeds: Tensor) -> None:
    """Count the tokens of [B, T, hidden_size] in the layer of `add_counter`."""
    counter = cache.layers[-1]
    assert isinstance(counter, CacheLayerMixin)
    _count(counter, inputs_embeds.shape[0], inputs_embeds.shape[1], inputs_embeds)


def _count(counter: CacheLayerMixin, B: int, T: int, like: Tensor) -> None:
    nothing = like.new_empty(B, 1, T, 0)
    counter.update(nothing, nothing)


class _CountedElsewhere(CacheLayerMixin):
    """A layer without keys that does not count. Its length is a tensor, which compiled code does not read."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.length, self.is_initialized = torch.zeros((), dtype=torch.long, device=device), True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store nothing."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No keys before those of the call."""
        return query_length, 0

    def get_seq_length(self) -> Tensor:  # type: ignore[override]  # as a static layer's
        """Not the number of tokens."""
        return self.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1


@contextmanager
def counting_outside(cache: Cache, tokens: int) -> Iterator[None]:
    """Count `tokens` more tokens here, if the cache has the layer of `add_counter`, and not inside.

    Code that is compiled inside would be compiled anew for each number.
    """
    counter: Any = cache.layers[-1] if cache.layers else None
    if not is_counter(counter):
        yield
        return
    cache.layers[-1] = _CountedElsewhere(counter.keys.device)
    try:
        yield
    finally:
        cache.layers[-1] = counter
    _count(counter, counter.keys.shape[0], tokens, counter.keys)


def is_counter(layer: Any) -> bool:
    """Whether a layer is that of `add_counter`, and has counted."""
    return isinstance(layer, DynamicSlidingWindowLayer) and layer.keys is not None and layer.keys.shape[3] == 0


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
