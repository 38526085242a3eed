"""transformers' own common tests of models, configurations and training, run on our models.

Two models: GKA layers alone, and a GKA layer followed by softmax attention. What their test classes skip for want
of a device or an optional package stays skipped; what a model outside of transformers cannot run is in CANNOT_RUN,
with the reason.
Their tests of `generate` and of torch.export are not in transformers' source distribution.
"""

from __future__ import annotations

import unittest
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers_suite import load

from gka import (
    GKAConfig,
    GKAForCausalLM,
    GKAForQuestionAnswering,
    GKAForSequenceClassification,
    GKAForTokenClassification,
    GKAModel,
)

common = load("test_modeling_common")
configuration = load("test_configuration_common")
training = load("test_training_mixin")

CANNOT_RUN = {
    "test_generation_tester_mixin_inheritance": "the tests of generate are not in the source distribution",
    "test_bc_cache_name_forward": "past_key_values, the name before 5.24, is taken without a warning",
}
CANNOT_RUN_WITHOUT_ATTENTION = {
    **CANNOT_RUN,
    **dict.fromkeys(
        (f"test_model_rope_scaling_from_config_{name}" for name in ("0_linear", "1_dynamic", "2_yarn")),
        "there is no rotary embedding without attention layers",
    ),
}


class Sizes:
    """What transformers' tests ask for sizes, configurations and inputs."""

    config_class = GKAConfig
    base_model_class = GKAModel
    causal_lm_class = GKAForCausalLM
    layer_types = ("linear_attention", "linear_attention")
    batch_size, seq_length, num_hidden_layers = 5, 7, 2
    hidden_size, num_attention_heads, vocab_size, num_labels = 32, 2, 99, 3
    is_training = True

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent

    def get_config(self) -> GKAConfig:
        return GKAConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=1,
            layer_types=list(self.layer_types),
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[GKAConfig, dict[str, Tensor]]:
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids).tril()}


class HybridSizes(Sizes):
    layer_types = ("linear_attention", "full_attention")


class Common:
    """Our side of the test classes; in a class of its own so that only its subclasses are collected."""

    model_tester: Any = None  # abstract in TrainingTesterMixin
    sizes = Sizes
    cannot_run = CANNOT_RUN
    all_model_classes = (
        GKAModel,
        GKAForCausalLM,
        GKAForSequenceClassification,
        GKAForTokenClassification,
        GKAForQuestionAnswering,
    )
    has_attentions = False
    test_can_init_all_missing_weights_before_2023 = True  # our files bear no year

    def setUp(self: Any) -> None:
        self.model_tester = self.sizes(self)
        if reason := self.cannot_run.get(self._testMethodName):
            self.skipTest(reason)

    @pytest.mark.slow
    def test_training_overfit(self: Any) -> None:
        super().test_training_overfit()  # type: ignore[misc]

    def test_configuration(self: Any) -> None:
        configuration.ConfigTester(self, config_class=GKAConfig, hidden_size=64).run_common_tests()


class PureTest(Common, training.TrainingTesterMixin, common.ModelTesterMixin, unittest.TestCase):
    """GKA layers alone."""

    cannot_run = CANNOT_RUN_WITHOUT_ATTENTION


class HybridTest(Common, training.TrainingTesterMixin, common.ModelTesterMixin, unittest.TestCase):
    """A GKA layer, then softmax attention."""

    sizes = HybridSizes
    has_attentions = True

    def test_attention_outputs(self) -> None:
        """In place of theirs, which expects attention weights of every block."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class._from_config(config, attn_implementation="eager").eval()
            outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
            self.assertEqual(len(outputs.attentions), self.sizes.layer_types.count("full_attention"))
            B, T, H = self.sizes.batch_size, self.sizes.seq_length, self.sizes.num_attention_heads
            self.assertEqual(outputs.attentions[0].shape, (B, H, T, T))
            self.assertEqual(len(outputs.hidden_states), self.sizes.num_hidden_layers + 1)
