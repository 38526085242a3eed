"""The layer in transformers: configuration, models, and their registration with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .config import GKAConfig, PublishedConfig
from .mixers import Mixer, register_mixer
from .model import GKAForCausalLM, GKAForSequenceClassification, GKAModel, GKAPreTrainedModel

__all__ = [
    "GKAConfig",
    "GKAForCausalLM",
    "GKAForSequenceClassification",
    "GKAModel",
    "GKAPreTrainedModel",
    "Mixer",
    "register_mixer",
]

AutoConfig.register(GKAConfig.model_type, GKAConfig)
AutoConfig.register(PublishedConfig.model_type, PublishedConfig)
AutoModel.register(GKAConfig, GKAModel)
AutoModelForCausalLM.register(GKAConfig, GKAForCausalLM)
AutoModelForSequenceClassification.register(GKAConfig, GKAForSequenceClassification)
