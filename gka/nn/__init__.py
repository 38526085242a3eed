"""The layer, its state, and its parts."""

from .cache import LayerState, detach_cache
from .layer import GatedKalmaNet

__all__ = ["GatedKalmaNet", "LayerState", "detach_cache"]
