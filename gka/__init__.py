"""Gated KalmaNet (arXiv 2511.21016): a sequence layer that solves a ridge regression over its past at every token.

`import gka` also tells transformers' Auto classes about the models.
"""

from . import ops
from ._version import __version__
from .hf import GKAConfig, GKAForCausalLM, GKAForSequenceClassification, GKAModel
from .hf.checkpoint import export_published
from .hf.convert import convert
from .nn.layer import GatedKalmaNet

__all__ = [
    "GKAConfig",
    "GKAForCausalLM",
    "GKAForSequenceClassification",
    "GKAModel",
    "GatedKalmaNet",
    "__version__",
    "convert",
    "export_published",
    "ops",
]
