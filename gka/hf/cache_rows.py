"""Rows of a transformers cache repeated and selected, for several continuations of one prompt.

A cache has both methods, and calls those of its layers. Layers for recurrent states have none, up to transformers
5.24: the cache of a hybrid would stop half done. They get the methods here, also in other models of the process.

Delete this file when the oldest supported version of transformers has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin


def batch_repeat_interleave(self: Any, repeats: int) -> None:
    """Repeat each row `repeats` times in a row."""
    _of_keys(self, "batch_repeat_interleave", repeats)
    _change(self, lambda held: held.repeat_interleave(repeats, dim=0))


def batch_select_indices(self: Any, indices: Tensor) -> None:
    """Keep only the rows `indices`, in their order."""
    _of_keys(self, "batch_select_indices", indices)
    _change(self, lambda held: held[indices])


def add_row_methods() -> None:
    """Give the methods to layers for recurrent states, unless transformers has them."""
    for method in (batch_repeat_interleave, batch_select_indices):
        if method.__name__ not in vars(LinearAttentionCacheLayerMixin):
            setattr(LinearAttentionCacheLayerMixin, method.__name__, method)


def _change(layer: Any, change: Callable[[Tensor], Tensor]) -> None:
    for states in (layer.conv_states, layer.recurrent_states):
        for number, held in states.items():
            if held is not None:
                states[number] = change(held)


def _of_keys(layer: Any, name: str, argument: Any) -> None:
    """The method of the class behind, in a layer that holds keys and values too."""
    if isinstance(layer, CacheLayerMixin):
        getattr(super(LinearAttentionCacheLayerMixin, layer), name)(argument)
