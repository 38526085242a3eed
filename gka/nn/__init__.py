"""The layer, its state, and its parts."""

from .cache import LayerState
from .layer import GatedKalmaNet

__all__ = ["GatedKalmaNet", "LayerState"]
