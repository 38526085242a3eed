"""The layer in transformers: configuration, models, and their registration with the Auto classes."""

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the models of gka need transformers: pip install 'gated-kalmanet[hf]'", name=error.name
    ) from error

from .cache_rows import add_row_methods
from .config import GKAConfig, PublishedConfig
from .heads import GKAForQuestionAnswering, GKAForSequenceClassification, GKAForTokenClassification
from .in_place import InPlaceOfAttention
from .mixers import Mixer, register_mixer
from .model import GKAForCausalLM, GKAModel
from .name_lists import join_lists
from .pretrained import GKAPreTrainedModel

__all__ = [
    "GKAConfig",
    "GKAForCausalLM",
    "GKAForQuestionAnswering",
    "GKAForSequenceClassification",
    "GKAForTokenClassification",
    "GKAModel",
    "GKAPreTrainedModel",
    "InPlaceOfAttention",
    "Mixer",
    "register_mixer",
]

AutoConfig.register(GKAConfig.model_type, GKAConfig)
AutoConfig.register(PublishedConfig.model_type, PublishedConfig)
AutoModel.register(GKAConfig, GKAModel)
AutoModelForCausalLM.register(GKAConfig, GKAForCausalLM)
AutoModelForSequenceClassification.register(GKAConfig, GKAForSequenceClassification)
AutoModelForTokenClassification.register(GKAConfig, GKAForTokenClassification)
AutoModelForQuestionAnswering.register(GKAConfig, GKAForQuestionAnswering)
join_lists()
add_row_methods()
