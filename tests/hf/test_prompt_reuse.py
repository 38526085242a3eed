"""Several continuations of one prompt, whose cache is copied, repeated and selected from."""

from __future__ import annotations

import copy

import pytest
import torch
from model_helpers import assert_near, cache_tensors, random_tokens, tiny_model
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM, StaticCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from gka import GatedKalmaNet, InPlaceOfAttention
from gka.hf import cache_rows

GREEDY = {"max_new_tokens": 7, "do_sample": False}
MODELS = ["gka", "gla", "hybrid", "hybrid, attention first", "hybrid, all three"]


def with_endings(prompts: torch.Tensor, copies: int) -> torch.Tensor:
    """Each prompt `copies` times, with another ending each."""
    rows = prompts.repeat_interleave(copies, dim=0)
    return torch.cat([rows, random_tokens(len(rows), 3, seed=5)], dim=1)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_continuations_of_copies(kind: str) -> None:
    """Each equals that of the whole prompt, and leaves the first cache as it was."""
    model, prompt = tiny_model(kind), random_tokens(1, 9)
    cache = model(prompt, use_cache=True).past_key_values
    before = {name: x.clone() for name, x in cache_tensors(cache).items()}
    for row in with_endings(prompt, 2).split(1):
        given = model.generate(row, past_key_values=copy.deepcopy(cache), **GREEDY)
        assert torch.equal(given, model.generate(row, **GREEDY))
    after = cache_tensors(cache)
    assert after.keys() == before.keys() and all(torch.equal(x, before[name]) for name, x in after.items())


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_continuations_of_repeated_rows(kind: str) -> None:
    model, prompts = tiny_model(kind), random_tokens(2, 9)
    cache = model(prompts, use_cache=True).past_key_values
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(3)
    rows = with_endings(prompts, 3)
    expected = model.generate(rows, **GREEDY)
    assert torch.equal(model.generate(rows, past_key_values=copied, **GREEDY), expected)
    assert cache.get_seq_length() == 9 and all(len(x) == 2 for x in cache_tensors(cache).values())


@torch.no_grad()
def test_samples_of_one_prompt() -> None:
    """`num_return_sequences` with a cache of as many rows gives what it gives without."""
    model, prompt = tiny_model("hybrid"), random_tokens(1, 9)
    options = dict(do_sample=True, max_new_tokens=6, num_return_sequences=4)
    cache = model(prompt[:, :-1], use_cache=True).past_key_values
    cache.batch_repeat_interleave(4)
    found = []
    for given in ({}, {"past_key_values": cache}):
        torch.manual_seed(0)
        found.append(model.generate(prompt, **options, **given))
    assert torch.equal(*found) and len(found[0].unique(dim=0)) > 1


@pytest.mark.parametrize("kind", ["gka", "hybrid"])
@torch.no_grad()
def test_selected_rows(kind: str) -> None:
    model, tokens = tiny_model(kind), random_tokens(3, 9)
    cache = model(tokens[:, :8], use_cache=True).past_key_values
    rows = torch.tensor([2, 0])
    cache.batch_select_indices(rows)
    out = model(tokens[rows, 8:], past_key_values=cache).logits
    assert_near(out, model(tokens[rows], use_cache=False).logits[:, -1:], 1e-6)


@torch.no_grad()
def test_rows_of_a_layer_with_states_and_keys() -> None:
    """In a model of transformers, where one layer of the cache holds both: its keys are repeated too."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).double().eval()
    model.model.layers[1].self_attn = InPlaceOfAttention(GatedKalmaNet(16, 2, layer_idx=1)).double()
    prompts = random_tokens(2, 9)
    cache = DynamicCache(config=config)
    model(prompts, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    rows = with_endings(prompts, 2)
    expected = model.generate(rows, **GREEDY)
    assert torch.equal(model.generate(rows, past_key_values=cache, **GREEDY), expected)


@torch.no_grad()
def test_a_static_cache_of_a_hybrid_stays_whole() -> None:
    """transformers' static keys have no such method: the error comes before a state changes."""
    model = tiny_model("hybrid, attention first")
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(random_tokens(2, 5), past_key_values=cache)
    with pytest.raises(AttributeError, match="batch_repeat_interleave"):
        cache.batch_repeat_interleave(2)
    assert all(len(x) == 2 for x in cache_tensors(cache).values())


def test_methods_of_transformers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(self: object, repeats: int) -> None: ...

    monkeypatch.setattr(LinearAttentionCacheLayerMixin, "batch_repeat_interleave", theirs)
    cache_rows.add_row_methods()
    assert vars(LinearAttentionCacheLayerMixin)["batch_repeat_interleave"] is theirs
