"""A cache that holds tokens: how a prompt goes on from it, and errors for what would be other text."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_helpers import PAD, assert_near, new_cache, random_tokens, tiny_model
from torch import Tensor

from gka.hf.cache_name import CACHE

KINDS = ("gka", "hybrid", "hybrid, sliding")
OPTIONS: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, pad_token_id=PAD)


@torch.no_grad()
def cache_after(model: torch.nn.Module, tokens: Tensor) -> Any:
    cache = new_cache(model.config)
    model(tokens, past_key_values=cache)
    return cache


@pytest.mark.parametrize("chunks", [{}, {"prefill_chunk_size": 3}], ids=["whole", "in chunks"])
@pytest.mark.parametrize("kind", KINDS)
def test_refuses_a_cache_that_holds_the_prompt(kind: str, chunks: dict[str, int]) -> None:
    model, ids = tiny_model(kind), random_tokens(2, 9)
    options = {**OPTIONS, **chunks}
    with pytest.raises(ValueError, match=r"cache holds 9 tokens and the input has 9.*copy\.deepcopy"):
        model.generate(ids, **{CACHE: cache_after(model, ids)}, **options)
    with pytest.raises(ValueError, match=r"cache holds 9 tokens and the input has 7.*copy\.deepcopy"):
        model.generate(ids[:, :7], **{CACHE: cache_after(model, ids)}, **options)
    used = cache_after(model, ids[:, :8])
    model.generate(ids, **{CACHE: used}, **OPTIONS)  # in chunks, transformers 5.16 would not go on from the cache
    with pytest.raises(ValueError, match=r"cache holds 13 tokens.*copy\.deepcopy"):
        model.generate(ids, **{CACHE: used}, **options)
    with pytest.raises(ValueError, match=r"copy\.deepcopy"):
        model.generate(ids, **{CACHE: used}, num_beams=2, **OPTIONS)
    with pytest.raises(ValueError, match=r"copy\.deepcopy"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), **{CACHE: used}, **OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_goes_on_in_several_ways(kind: str) -> None:
    model, prompt = tiny_model(kind), random_tokens(2, 9)
    cache = cache_after(model, prompt)
    for seed in (1, 2):
        ids = torch.cat([prompt, random_tokens(2, seed, seed=seed)], dim=1)
        expected = model.generate(ids, **OPTIONS)
        assert torch.equal(model.generate(ids, **{CACHE: copy.deepcopy(cache)}, **OPTIONS), expected)
        new, mask = ids[:, 9:], torch.ones_like(ids)
        alone = model.generate(new, attention_mask=mask, **{CACHE: copy.deepcopy(cache)}, **OPTIONS)
        assert torch.equal(alone[:, seed:], expected[:, 9 + seed :])
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_refuses_a_mask_for_other_tokens(kind: str) -> None:
    model, ids = tiny_model(kind), random_tokens(2, 9)
    full = model(ids, use_cache=False).logits
    for columns in (3, 8, 10):
        with pytest.raises(ValueError, match=r"expected \[B, 9\]: 6 tokens in past_key_values and 3 new ones"):
            model(
                ids[:, 6:], attention_mask=torch.ones(2, columns), past_key_values=cache_after(model, ids[:, :6])
            )
    right = model(ids[:, 6:], attention_mask=torch.ones(2, 9), past_key_values=cache_after(model, ids[:, :6]))
    assert_near(right.logits, full[:, 6:], 1e-6)
    with pytest.raises(ValueError, match=r"expected \[B, 9\]: 0 tokens"):
        model(ids, attention_mask=torch.ones(2, 12), use_cache=False)
    with pytest.raises(ValueError, match="8 columns, the cache holds 6 tokens and the input has 3"):
        model.generate(
            ids[:, 6:], attention_mask=torch.ones(2, 8), **{CACHE: cache_after(model, ids[:, :6])}, **OPTIONS
        )
