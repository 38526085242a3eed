"""A model's cache at fixed addresses, for a step that is recorded once and replayed for every token.

A `DynamicCache` moves in: its tensors are copied to buffers, and its layers hold the buffers from then on.
States of GKA layers have a constant size and are written in place. The keys and values of softmax attention
grow, so they get a ring of L slots: token t goes to slot t mod L. L is the window of a sliding layer. With full
attention it is a `capacity` that the tokens never exceed. A mask tells which slots hold real tokens.

Legend: B batch, Hk key/value heads, D head dim, L slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from .length import is_counter

FULL, SLIDING = "full_attention", "sliding_attention"


def new_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer that can be written outside inference mode, wherever it is made."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)


class Slots:
    """The slots of all attention layers of one kind.

    real: [B, L] bool, True where a slot holds a real token.
    now: [1] int64, the slot of the present token.
    owned: whether a layer reorders `real` with its keys, as one of those that share it does.
    """

    def __init__(self, batch: int, length: int, device: torch.device) -> None:
        self.real = torch.zeros(batch, length, dtype=torch.bool, device=device)
        self.now = torch.zeros(1, dtype=torch.long, device=device)
        self.places = torch.arange(length, device=device)
        self.length, self.owned = length, False

    def fill(self, tokens: int, mask: Tensor | None) -> None:
        """Only the last of the first `tokens` tokens are there; mask is [B, tokens or more], 0 for padding."""
        last, places = self.last(tokens)
        self.real.zero_()
        self.real[:, places] = True if mask is None else mask[:, last] != 0

    def last(self, tokens: int, at_most: int | None = None) -> tuple[Tensor, Tensor]:
        """Numbers and slots of the last of `tokens` tokens, as many as there are slots, and `at_most`."""
        count = min(tokens, self.length if at_most is None else at_most)
        numbers = torch.arange(tokens - count, tokens, device=self.places.device)
        return numbers, numbers % self.length

    def step(self, tokens: Tensor) -> None:
        """Make room for the token after `tokens` tokens, [1] int64."""
        self.now.copy_(tokens % self.length)
        self.real.logical_or_(self.places == self.now)


class FixedKeys(CacheLayerMixin):
    """Keys and values [B, Hk, L, D] of an attention layer, for one token at a time.

    Args:
        keys, values: the buffers.
        slots: the slots of the layer.
        tokens: the number of tokens.
        owns_slots: whether the mask of the slots is reordered with this layer; layers share it.
    """

    def __init__(self, keys: Tensor, values: Tensor, slots: Slots, tokens: int, owns_slots: bool) -> None:
        super().__init__()
        self.keys, self.values, self.slots = keys, values, slots
        self.cumulative_length, self.owns_slots = tokens, owns_slots
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the buffers are there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, Hk, 1, D] to the slot of the present token; all slots."""
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.slots.now, key_states)
        self.values.index_copy_(2, self.slots.now, value_states)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, in place."""
        rows = (self.keys, self.values, self.slots.real) if self.owns_slots else (self.keys, self.values)
        for held in rows:
            assert held is not None
            held.copy_(held.index_select(0, beam_idx.to(held.device)))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of slots, from the first on."""
        return self.slots.length, 0

    def get_seq_length(self) -> int:
        """The number of tokens so far."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """The number of slots."""
        return self.slots.length


_States = dict[int, Tensor | None]


def _states(layer: Any) -> Iterator[tuple[str, _States, int, Tensor]]:
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name)
        for number, held in states.items():
            if held is not None:
                yield name, states, number, held


def layout(cache: Cache) -> tuple[Any, ...] | None:
    """Shapes, dtypes, devices in a cache, not the number of tokens; None for a cache that cannot move in."""
    found: list[Any] = []
    layer: Any
    for layer in cache.layers:
        if getattr(layer, "record_past", False):
            return None
        if type(layer) is LinearAttentionLayer:
            found.append(tuple((tuple(x.shape), x.dtype, x.device) for _, _, _, x in _states(layer)))
        elif is_counter(layer):
            found.append(None)
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.keys is not None:
            sizes = [(x.shape[0], x.shape[1], x.shape[3], x.dtype, x.device) for x in (layer.keys, layer.values)]
            found.append((*sizes, getattr(layer, "sliding_window", None)))
        else:
            return None
    return tuple(found)


class FixedCache:
    """Buffers for caches of one `layout`.

    Args:
        capacity: slots of layers with full attention.
        device: the device of the model.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.slots: dict[str, Slots] = {}
        self._buffers: dict[tuple[int, str, int], Tensor] = {}
        self._homes: list[tuple[_States, int, Tensor]] = []
        self._grown: dict[int, DynamicLayer] = {}  # the layers that stood where a FixedKeys stands now
        self.tokens = new_zeros((1,), torch.long, device)  # their number, for the recorded step

    def move_in(self, cache: Cache, mask: Tensor | None) -> None:
        """Put what a cache holds into the buffers, which take its place; mask [B, tokens or more], 0 for pads."""
        tokens = int(cache.get_seq_length())
        self._homes, self._grown = [], {}
        self.tokens.fill_(tokens)
        for slots in self.slots.values():
            slots.owned = False
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, LinearAttentionLayer):
                self._states_in(index, layer)
            elif not is_counter(layer):
                cache.layers[index] = self._keys_in(index, layer, tokens, mask)
                self._grown[index] = layer  # type: ignore[assignment]

    def _states_in(self, index: int, layer: LinearAttentionLayer) -> None:
        for name, states, number, held in _states(layer):
            buffer = self._buffer((index, name, number), held, tuple(held.shape))
            buffer.copy_(held)
            states[number] = buffer
            self._homes.append((states, number, buffer))

    def _keys_in(self, index: int, layer: Any, tokens: int, mask: Tensor | None) -> FixedKeys:
        """The layer with the keys and values of a layer that grows, which is left without."""
        kind = SLIDING if isinstance(layer, DynamicSlidingWindowLayer) else FULL
        if kind not in self.slots:
            length = layer.sliding_window if kind == SLIDING else self.capacity
            with torch.inference_mode(False):
                self.slots[kind] = Slots(layer.keys.shape[0], length, layer.keys.device)
        slots = self.slots[kind]
        owns_slots, slots.owned = not slots.owned, True
        if owns_slots:
            slots.fill(tokens, mask)
        buffers = []
        for name in ("keys", "values"):
            held = getattr(layer, name)
            buffer = self._buffer((index, name, 0), held, (*held.shape[:2], slots.length, held.shape[3]))
            _, places = slots.last(tokens, min(held.shape[2], slots.length))
            buffer[:, :, places] = held[:, :, held.shape[2] - len(places) :]
            setattr(layer, name, None)
            buffers.append(buffer)
        return FixedKeys(buffers[0], buffers[1], slots, tokens, owns_slots)

    def move_out(self, cache: Cache) -> None:
        """Give a cache that moved in layers and tensors of its own again."""
        for states, number, buffer in self._homes:
            held = states[number]
            states[number] = buffer.clone() if held is buffer else held
        fixed: Any
        for index, layer in self._grown.items():
            fixed = cache.layers[index]
            tokens, at_most = fixed.cumulative_length, None
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length, at_most = tokens, layer.sliding_window - 1
            _, places = fixed.slots.last(tokens, at_most)
            layer.keys, layer.values = fixed.keys[:, :, places], fixed.values[:, :, places]
            cache.layers[index] = layer
        counter: Any
        for counter in filter(is_counter, cache.layers):  # its tensors are as long as its tokens, and empty
            for name in ("keys", "values"):
                held = getattr(counter, name)
                setattr(counter, name, held.new_zeros(*held.shape[:2], counter.cumulative_length, 0))

    def forget_cache(self) -> None:
        """Keep nothing of the cache that moved in."""
        self._homes, self._grown = [], {}

    def settle(self) -> None:
        """Bring states home that were replaced since the last step, as a reordering of beams does."""
        for states, number, buffer in self._homes:
            held = states[number]
            if held is not buffer and held is not None:
                buffer.copy_(held)
                states[number] = buffer

    def count(self, cache: Cache, tokens: int) -> None:
        """Tell the layers that count on the host the number of tokens; a replay does not run their code."""
        for layer in cache.layers:
            if isinstance(layer, FixedKeys | DynamicSlidingWindowLayer):
                layer.cumulative_length = tokens

    def step(self) -> None:
        """Make room for one more token; recorded."""
        for slots in self.slots.values():
            slots.step(self.tokens)

    def _buffer(self, key: tuple[int, str, int], like: Tensor, shape: tuple[int, ...]) -> Tensor:
        if key not in self._buffers:
            self._buffers[key] = new_zeros(shape, like.dtype, like.device)
        return self._buffers[key]
