"""Gated KalmaNet (arXiv 2511.21016): a sequence layer that solves a ridge regression over its past at every token.

The operation and the layer need torch alone. The models need transformers, the extra `hf`, and are imported when
first asked for. transformers' Auto classes know the models once gka is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import ops
from ._auto_classes import register_when_used
from ._version import __version__
from .nn import GatedKalmaNet, LayerState

if TYPE_CHECKING:
    from .hf import GKAConfig, GKAForCausalLM, GKAForSequenceClassification, GKAModel, InPlaceOfAttention
    from .hf.checkpoint import export_published
    from .hf.convert import convert

_OF_TRANSFORMERS = {
    "GKAConfig": ".hf",
    "GKAForCausalLM": ".hf",
    "GKAForSequenceClassification": ".hf",
    "GKAModel": ".hf",
    "InPlaceOfAttention": ".hf",
    "convert": ".hf.convert",
    "export_published": ".hf.checkpoint",
}

__all__ = [
    "GKAConfig",
    "GKAForCausalLM",
    "GKAForSequenceClassification",
    "GKAModel",
    "GatedKalmaNet",
    "InPlaceOfAttention",
    "LayerState",
    "__version__",
    "convert",
    "export_published",
    "ops",
]

register_when_used()


def __getattr__(name: str) -> Any:
    if name not in _OF_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_OF_TRANSFORMERS[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
