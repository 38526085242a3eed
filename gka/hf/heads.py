"""Models with another head than the language model's, transformers' own: linear maps of the last hidden states."""

from __future__ import annotations

from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from .pretrained import GKAPreTrainedModel


class GKAForSequenceClassification(GenericForSequenceClassification, GKAPreTrainedModel):
    """The blocks and a linear classifier of each row's last token (config.num_labels)."""


class GKAForTokenClassification(GenericForTokenClassification, GKAPreTrainedModel):
    """The blocks and a linear classifier of every token (config.num_labels), which sees the tokens before it."""


class GKAForQuestionAnswering(GenericForQuestionAnswering, GKAPreTrainedModel):
    """The blocks and two scores of every token: that the answer starts there, and that it ends there.

    A token sees those before it alone: put the question in front of the text.
    """
