"""The models in the lists of names by which transformers and PEFT decide what a model is.

    transformers   by class name: whether the Trainer shifts labels before it smooths them, the task in a model
                   card; by model type: the warning of lm_eval
    PEFT           by model type: the modules that an adapter changes where `target_modules` is not given. Ours
                   are those of Qwen3, whose names of modules the models have

No function of either adds to these lists. PEFT is not imported here: its lists change when it is imported.
"""

from __future__ import annotations

from types import ModuleType

from transformers.models.auto import modeling_auto

from .._when_imported import when_imported
from .config import GKAConfig
from .heads import GKAForQuestionAnswering, GKAForSequenceClassification, GKAForTokenClassification
from .model import GKAForCausalLM, GKAModel

_SAME_NAMES = "qwen3"  # the model type whose modules have the same names


def join_lists() -> None:
    """Put the models into the lists of transformers now, and into those of PEFT when it is imported."""
    for names, model in (
        (modeling_auto.MODEL_MAPPING_NAMES, GKAModel),
        (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, GKAForCausalLM),
        (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, GKAForSequenceClassification),
        (modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, GKAForTokenClassification),
        (modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, GKAForQuestionAnswering),
    ):
        names[GKAConfig.model_type] = model.__name__
    when_imported("peft.utils.constants", _join_those_of_peft)


def _join_those_of_peft(constants: ModuleType) -> None:
    for name, modules_of in vars(constants).items():
        if name.endswith("_MODULES_MAPPING") and _SAME_NAMES in modules_of:
            modules_of.setdefault(GKAConfig.model_type, modules_of[_SAME_NAMES])
