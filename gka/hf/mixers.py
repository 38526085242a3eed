"""What a "linear_attention" block may be: a GKA layer, or a layer that is registered under a name of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

OURS = ("gka", "gla")  # those that are GatedKalmaNet


class Mixer(nn.Module):
    """Another recurrent layer, which a model takes in the place of its GKA layers.

    Args:
        config: of the model, a GKAConfig.
        layer_idx: the layer's place in the cache.

    Raises:
        ValueError: layer_idx is no place in a cache.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        if type(layer_idx) is not int or layer_idx < 0:
            raise ValueError(f"layer_idx is {layer_idx!r}; expected the number of the block")

    @classmethod
    def check(cls, config: Any) -> None:
        """Raise ValueError for a configuration that does not fit the layer."""

    @classmethod
    def initialise(cls, module: nn.Module) -> None:
        """Set first values of `module`, any module of the model that has parameters of its own."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """[B, T, hidden_size] -> the same, as GatedKalmaNet."""
        raise NotImplementedError


_REGISTERED: dict[str, type[Mixer]] = {}


def register_mixer(name: str, mixer: type[Mixer]) -> None:
    """Let `GKAConfig.mixer` be `name`, which makes every "linear_attention" block a `mixer`.

    Raises:
        ValueError: the name is taken.
    """
    if name in OURS or _REGISTERED.get(name, mixer) is not mixer:
        raise ValueError(f"name is {name!r}, which is taken; expected none of {known_mixers()}")
    _REGISTERED[name] = mixer


def known_mixers() -> tuple[str, ...]:
    """The names that `GKAConfig.mixer` may have."""
    return (*OURS, *_REGISTERED)


def registered_mixer(name: str) -> type[Mixer]:
    """The layer that is registered under that name."""
    return _REGISTERED[name]
