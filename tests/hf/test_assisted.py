"""Assisted generation needs a state that can be rolled back: every way into it says that there is none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_helpers import cache_tensors, new_cache, random_tokens, tiny_model
from transformers import Qwen3Config, Qwen3ForCausalLM

KINDS = ("gka", "gla", "hybrid")


def transformer() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8)
    return Qwen3ForCausalLM(Qwen3Config(num_attention_heads=2, num_key_value_heads=1, **sizes)).double().eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"])
def test_refuses_assistants(kind: str, way: str) -> None:
    """transformers' error for models whose state is a summary: Mamba's, and ours."""
    given: dict[str, Any] = {
        "assistant_model": transformer(),
        "prompt_lookup_num_tokens": 3,
        "assistant_early_exit": 1,
    }
    with pytest.raises(ValueError, match=r"not supported with stateful models, such as GKAForCausalLM"):
        tiny_model(kind).generate(random_tokens(1, 5), max_new_tokens=4, do_sample=False, **{way: given[way]})


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_to_assist(kind: str) -> None:
    with pytest.raises(
        ValueError, match="cannot be rolled back: a model with such layers cannot be the assistant"
    ):
        transformer().generate(random_tokens(1, 5), assistant_model=tiny_model(kind), max_new_tokens=4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_crop_is_refused_and_a_copy_is_the_way_back(kind: str) -> None:
    model, tokens = tiny_model(kind), random_tokens(2, 9)
    cache = new_cache(model.config)
    model(tokens[:, :5], past_key_values=cache)
    before = copy.deepcopy(cache)
    model(tokens[:, 5:], past_key_values=cache)
    with pytest.raises(RuntimeError, match="`crop` was called"):
        cache.crop(-4)
    fresh = new_cache(model.config)
    model(tokens[:, :5], past_key_values=fresh)
    for name, tensor in cache_tensors(before).items():
        assert torch.equal(tensor, cache_tensors(fresh)[name]), name
    going_on = random_tokens(2, 3, seed=1)
    assert torch.equal(
        model(going_on, past_key_values=before).logits, model(going_on, past_key_values=fresh).logits
    )
