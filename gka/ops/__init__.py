"""The operation: `gated_kalmanet` for whole sequences, `gated_kalmanet_step` for one token (see api.py)."""

from .api import gated_kalmanet, gated_kalmanet_step
from .pool import gather_states, scatter_states_
from .types import State

__all__ = ["State", "gated_kalmanet", "gated_kalmanet_step", "gather_states", "scatter_states_"]
