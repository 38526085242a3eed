"""The layers for "linear_attention" blocks: GKA layers, and other layers that are registered by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

OURS = ("gka", "gla")  # those that are GatedKalmaNet


class Mixer(nn.Module):
    """Base class for another recurrent layer in place of GKA layers.

    Args:
        config: the GKAConfig of the model.
        layer_idx: index of the layer in the cache.

    Raises:
        ValueError: layer_idx is not the index of a layer.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        if type(layer_idx) is not int or layer_idx < 0:
            raise ValueError(f"layer_idx is {layer_idx!r}; expected the number of the block")

    @classmethod
    def check(cls, config: Any) -> None:
        """Raise ValueError if the configuration does not fit the layer."""

    @classmethod
    def initialise(cls, module: nn.Module) -> None:
        """Set the initial values of `module`, which can be any module of the model with its own parameters."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """[B, T, hidden_size] -> [B, T, hidden_size], as GatedKalmaNet."""
        raise NotImplementedError


_REGISTERED: dict[str, type[Mixer]] = {}


def register_mixer(name: str, mixer: type[Mixer]) -> None:
    """Register a layer class: with `GKAConfig.mixer = name`, every "linear_attention" block uses `mixer`.

    Raises:
        ValueError: the name is already in use.
    """
    if name in OURS or _REGISTERED.get(name, mixer) is not mixer:
        raise ValueError(f"name is {name!r}, which is taken; expected none of {known_mixers()}")
    _REGISTERED[name] = mixer


def known_mixers() -> tuple[str, ...]:
    """The valid names for `GKAConfig.mixer`."""
    return (*OURS, *_REGISTERED)


def registered_mixer(name: str) -> type[Mixer]:
    """The layer class registered under a name."""
    return _REGISTERED[name]
