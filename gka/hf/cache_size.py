"""The size of a model's cache in bytes. Attention layers keep every token, GKA layers a state of constant size."""

from __future__ import annotations

from typing import Any

import torch

from .cache_name import CACHE


@torch.no_grad()
def cache_bytes(model: Any, tokens: int) -> int:
    """Bytes of the cache for one sequence.

    The function measures the cache after one token. Keys and values are then multiplied by the number of tokens
    that a layer keeps.

    Args:
        model: a causal language model of transformers.
        tokens: length of the sequence.
    """
    cache = getattr(model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True), CACHE)
    total = 0
    for layer in cache.layers:
        states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
        total += sum(state.nbytes for state in states if state is not None)
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None:
            continue
        window = getattr(layer, "sliding_window", None)
        kept = tokens if window is None else min(tokens, window - 1)
        total += kept * (keys.nbytes + values.nbytes)
    return total
