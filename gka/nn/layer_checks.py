"""What a GatedKalmaNet, `layer` here, may be made of and called with, and the errors.

Legend: B batch, T time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..ops.autocast import autocast_dtype
from ..ops.checks import MAX_DIM, check_cu_seqlens
from .cache import check_cache
from .padding import check_mask
from .projections import is_plain

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


def check_counts(**counts: Any) -> None:
    """ValueError for a count that is not an integer of at least 1."""
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}; expected an integer of at least 1")


def check_sizes(layer: Any, kv_proj_rank: int | None, kv_learnable_residual: bool) -> None:
    """ValueError for sizes of a layer, or switches of its expanded heads, that do not go together."""
    check_counts(num_kv_heads=layer.num_kv_heads, head_dim=layer.head_dim)
    optional = {"chunk_size": layer.chunk_size, "kv_proj_rank": kv_proj_rank}
    check_counts(**{name: value for name, value in optional.items() if value is not None})
    if layer.head_dim > MAX_DIM:
        raise ValueError(f"head_dim is {layer.head_dim}; expected at most {MAX_DIM}")
    if layer.num_heads % layer.num_kv_heads:
        raise ValueError(
            f"num_kv_heads is {layer.num_kv_heads}; expected a divisor of num_heads, {layer.num_heads}"
        )
    if kv_proj_rank is not None and layer.num_kv_heads == layer.num_heads:
        raise ValueError(f"kv_proj_rank is {kv_proj_rank}; expected None with as many key/value heads as heads")
    if kv_learnable_residual and kv_proj_rank is None:
        raise ValueError("kv_learnable_residual is True; expected False without kv_proj_rank")
    if layer.layer_idx is not None and (type(layer.layer_idx) is not int or layer.layer_idx < 0):
        raise ValueError(f"layer_idx is {layer.layer_idx!r}; expected None or an integer of at least 0")


def check_call(layer: Any, x: Tensor, mask: Tensor | None, cache: Cache | None, cu_seqlens: Tensor | None) -> None:
    """TypeError or ValueError for arguments of a call that do not fit the layer or each other."""
    for name, value in (("hidden_states", x), ("attention_mask", mask)):
        if not isinstance(value, Tensor) and (value is not None or name == "hidden_states"):
            raise TypeError(f"{name} is a {type(value).__name__}; expected a torch.Tensor")
    if x.ndim != 3 or x.shape[2] != layer.hidden_size:
        raise ValueError(f"hidden_states has shape {tuple(x.shape)}; expected [B, T, {layer.hidden_size}]")
    if x.shape[1] and not x.is_meta and autocast_dtype(x.device) is None and is_plain(layer.q_proj, nn.Linear):
        dtype = layer.q_proj.weight.dtype  # a projection that is not plain may cast its input
        if x.dtype != dtype:
            raise TypeError(
                f"hidden_states has dtype {x.dtype}; expected that of the weights, {dtype}, outside of "
                "torch.autocast"
            )
    if mask is not None and tuple(mask.shape) != tuple(x.shape[:2]):
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; expected {tuple(x.shape[:2])}")
    if mask is not None:
        check_mask(mask)
    if cu_seqlens is not None and mask is not None:
        raise ValueError("cu_seqlens and attention_mask are both given; leave padding out of a packed batch")
    if cu_seqlens is not None and cache is not None:
        raise ValueError(
            "cu_seqlens and past_key_values are both given; a cache has one state per row: "
            "pass the sequences as rows, padded, with an attention_mask"
        )
    if cu_seqlens is not None and x.shape[0] != 1:
        raise ValueError(f"hidden_states has {x.shape[0]} rows; expected 1 with cu_seqlens: concatenate them")
    if cu_seqlens is not None:  # the op does so, too, but the convolutions come first
        check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])
    if cache is not None:
        check_cache(cache, layer.layer_idx)


def check_alone(**others: Any) -> None:
    """ValueError for an argument that is given beside a part of a batch (`gka.nn.part`)."""
    for name, value in others.items():
        if value is not None and value is not False:
            raise ValueError(
                f"{name} is given under context parallelism; expected none: a part of a batch knows its packed "
                "sequences, and states are neither read nor returned"
            )
