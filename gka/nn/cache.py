"""The state of a layer between calls: passed and returned, or stored in a transformers cache.

The cache stores it as for transformers' linear attention layers: convolution states 0, 1, 2 of q, k, v; recurrent
states 0 S_kk and 1 S_kv. transformers is imported only if a cache is given.

Legend: B batch, H query heads, Hk key/value heads, D head dim, W width of the convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..ops import State
from ..ops.types import shown

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


class LayerState(NamedTuple):
    """The state of every row after its last token.

    conv: the last inputs of the convolutions of q, k and v, [B, H D or Hk D, W - 1] each; if v has no
        convolution, the third is empty, [B, Hk D, 0].
    state: the sums S_kk and S_kv, [B, H, D, D] each.
    """

    conv: list[Tensor]
    state: State

    def detach(self) -> LayerState:
        """The same numbers, through which no gradient flows: for backpropagation through a part of a sequence."""
        S_kk, S_kv = self.state
        sums = State(None if S_kk is None else S_kk.detach(), S_kv.detach())
        return LayerState([part.detach() for part in self.conv], sums)

    def to(self, device: torch.device | str) -> LayerState:
        """The same numbers on a device."""
        return LayerState([part.to(device) for part in self.conv], self.state.to(device))

    def __repr__(self) -> str:
        """Shapes, dtypes and devices, not the numbers."""
        return f"LayerState(conv={shown(self.conv)}, state={self.state!r})"


def checked_layer_state(given: Any, conv_shapes: Sequence[tuple[int, ...]]) -> LayerState:
    """Check a state (three convolution inputs with the given shapes, and (S_kk, S_kv)) and return a LayerState.

    Raises:
        TypeError, ValueError: it is not such a state. The op checks the sums.
    """
    if isinstance(given, State):
        raise TypeError(
            "state is a State, the sums of the op; expected a LayerState, the state of a layer, as "
            "return_state=True gives"
        )
    for name, value, expected in (
        ("state", given, "a pair of the convolutions' inputs and (S_kk, S_kv), as return_state=True gives"),
        ("state.conv", given[0] if isinstance(given, tuple | list) and given else (), "three tensors"),
        ("state.state", given[1] if isinstance(given, tuple | list) and len(given) == 2 else (), "a pair"),
    ):
        parts = 3 if name == "state.conv" else 2
        if not isinstance(value, tuple | list):
            raise TypeError(f"{name} is a {type(value).__name__}; expected {expected}")
        if len(value) != parts:
            raise ValueError(f"{name} has {len(value)} parts; expected {expected}")
    for number, (part, shape) in enumerate(zip(given[0], conv_shapes, strict=True)):
        if not isinstance(part, Tensor):
            raise TypeError(f"state.conv[{number}] is a {type(part).__name__}; expected a torch.Tensor {shape}")
        if tuple(part.shape) != shape:
            raise ValueError(f"state.conv[{number}] has shape {tuple(part.shape)}; expected {shape}")
    return LayerState(list(given[0]), State(*given[1]))


def check_cache(cache: Any, layer_idx: int | None) -> None:
    """Raise TypeError or ValueError if `cache` is not a cache, or has no place for the layer."""
    try:
        from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin
    except ModuleNotFoundError:
        raise TypeError(
            f"past_key_values is a {type(cache).__name__}; expected a transformers.Cache, which needs "
            "pip install 'gated-kalmanet[hf]'; without it pass state= and return_state=True"
        ) from None
    if not isinstance(cache, Cache):
        raise TypeError(f"past_key_values is a {type(cache).__name__}; expected a transformers.Cache")
    if layer_idx is None:
        raise ValueError(
            "past_key_values is given and layer_idx is None; give the layer its layer_idx, the place in the cache"
        )
    held = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not isinstance(held, LinearAttentionCacheLayerMixin) and getattr(held, "is_initialized", False):
        raise ValueError(
            f"past_key_values has keys and values at {layer_idx}, a GKA layer, as PEFT's prefix tuning does; "
            "a recurrent state has no prefix to attend to: use prompt tuning instead"
        )
    if not isinstance(held, LinearAttentionCacheLayerMixin):
        raise ValueError(
            f"past_key_values has no linear_attention layer at {layer_idx}; "
            "expected one made with the model's configuration, DynamicCache(config=model.config)"
        )
    if held.record_past:
        raise ValueError(
            "past_key_values records its past, to be rolled back; a GKA layer's state cannot be rolled back: "
            "a model with such layers cannot be the assistant of assisted generation"
        )


def read_cache(cache: Cache, layer_idx: int, batch: int, solves: bool) -> LayerState | None:
    """The state of a layer in the cache; None if there is none yet."""
    if not cache.has_previous_state(layer_idx):
        return None
    held: Any = cache.layers[layer_idx]
    S_kk, S_kv = held.recurrent_states[0] if solves else None, held.recurrent_states[1]
    if S_kv.shape[0] != batch:
        raise ValueError(
            f"hidden_states has {batch} rows and past_key_values {S_kv.shape[0]}; expected the same number"
        )
    if torch.is_grad_enabled():  # the cache is written in place, and autograd may still need the old values
        S_kk, S_kv = None if S_kk is None else S_kk.clone(), S_kv.clone()
    return LayerState([held.conv_states[number] for number in range(3)], State(S_kk, S_kv))


def write_cache(cache: Cache, layer_idx: int, new: LayerState) -> None:
    """Write the new state to the cache."""
    held: Any = cache.layers[layer_idx]
    for number, inputs in enumerate(new.conv):
        if held.has_previous_state[number]:  # transformers' update would first join the old inputs and the new
            held.conv_states[number].copy_(inputs)
        else:
            cache.update_conv_state(inputs, layer_idx, state_idx=number)
    for number, sums in enumerate(new.state):
        if sums is not None and sums is not held.recurrent_states[number]:  # a decode step has written it in place
            cache.update_recurrent_state(sums, layer_idx, state_idx=number)


def detach_cache(cache: Cache) -> None:
    """Stop gradients at what a cache of transformers holds, in place; the numbers stay.

    For backpropagation through a part of a sequence: between the backward pass of one part and the forward pass of
    the next. Softmax attention's keys and values are detached, too.
    """
    for layer in cache.layers:
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            for number, tensor in states.items():
                if tensor is not None:  # the next call writes to it in place: the graph of the last keeps its own
                    states[number] = tensor.detach().clone()
        for name in ("keys", "values"):
            if isinstance(tensor := getattr(layer, name, None), Tensor):
                setattr(layer, name, tensor.detach())
