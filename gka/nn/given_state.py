"""The state with which a call of the layer begins: as given and checked, or zeros.

Legend: B batch, T time, H query heads, Hk key/value heads, D head dim, W width of the convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import State
from .cache import LayerState, checked_layer_state
from .gated_norm import at_least_float32


def given_state(
    layer: Any, state: Any, return_state: bool, x: Tensor, cache: Any, cu_seqlens: Tensor | None
) -> LayerState | None:
    """The state of a call of a `GatedKalmaNet` on x [B, T, hidden_size]; None means no past.

    The op checks the sums of the state; everything else is checked here.

    Raises:
        TypeError, ValueError: the state is none of this layer's, or is combined with a cache; a state is given or
            wanted with packed sequences.
    """
    if (state is not None or return_state) and cu_seqlens is not None:
        raise ValueError("cu_seqlens is given with state or return_state; pass the sequences as rows, padded")
    if state is None:
        return None
    if cache is not None:
        raise ValueError("state and past_key_values are both given; expected one of them")
    given = checked_layer_state(state, [tuple(part.shape) for part in no_past(layer, x).conv])
    if x.shape[1] != 1 or torch.is_grad_enabled():
        return given
    # A decode step writes over its state: here over a copy.
    copies = (part.clone() if isinstance(part, Tensor) else part for part in given.state)
    return LayerState(given.conv, State(*copies))  # type: ignore[arg-type]  # the op checks them


def no_past(layer: Any, x: Tensor) -> LayerState:
    """The state before the first token of the rows x [B, T, hidden_size]: zeros."""
    B, D, W = x.shape[0], layer.head_dim, layer.conv_size
    streams = (layer.q_proj, layer.k_proj, layer.v_proj)
    widths = (W - 1, W - 1, 0 if layer.v_conv1d is None else W - 1)
    conv = [
        x.new_zeros(B, p.out_features if width or p is not layer.v_proj else layer.k_proj.out_features, width)
        for p, width in zip(streams, widths, strict=True)
    ]
    S = x.new_zeros(B, layer.num_heads, D, D, dtype=at_least_float32(x[:0]).dtype)
    return LayerState(conv, State(S.clone() if layer.solves else None, S))
