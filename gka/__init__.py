"""Gated KalmaNet (arXiv 2511.21016): a sequence layer that solves a ridge regression over its past at every token.

The operation and the layer need only torch; the models need transformers (the extra `hf`). Every name is imported
at its first use, so `gka --help` imports neither. After `import gka`, transformers' Auto classes know the models.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._auto_classes import register_when_used
from ._version import __version__

if TYPE_CHECKING:
    from . import hf, nn, ops
    from .hf import (
        GKAConfig,
        GKAForCausalLM,
        GKAForQuestionAnswering,
        GKAForSequenceClassification,
        GKAForTokenClassification,
        GKAModel,
        InPlaceOfAttention,
    )
    from .hf.checkpoint import export_published
    from .hf.convert import convert
    from .nn import GatedKalmaNet, LayerState, detach_cache

_WHERE = {
    "GKAConfig": ".hf",
    "GKAForCausalLM": ".hf",
    "GKAForQuestionAnswering": ".hf",
    "GKAForSequenceClassification": ".hf",
    "GKAForTokenClassification": ".hf",
    "GKAModel": ".hf",
    "GatedKalmaNet": ".nn",
    "InPlaceOfAttention": ".hf",
    "LayerState": ".nn",
    "convert": ".hf.convert",
    "detach_cache": ".nn",
    "export_published": ".hf.checkpoint",
}

__all__ = [
    "GKAConfig",
    "GKAForCausalLM",
    "GKAForQuestionAnswering",
    "GKAForSequenceClassification",
    "GKAForTokenClassification",
    "GKAModel",
    "GatedKalmaNet",
    "InPlaceOfAttention",
    "LayerState",
    "__version__",
    "convert",
    "detach_cache",
    "export_published",
    "hf",
    "nn",
    "ops",
]

register_when_used()


def __getattr__(name: str) -> Any:
    if name in ("hf", "nn", "ops"):
        return importlib.import_module(f".{name}", __name__)
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_WHERE[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
