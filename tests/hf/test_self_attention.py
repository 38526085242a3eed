"""A GKA layer as `self_attn` in models of transformers whose code stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import relative_error
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

import gka
from gka.hf.self_attention import GKASelfAttention, real_tokens

SIZES: dict[str, Any] = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
FAMILIES = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
LAYERS = {"the first": [0], "the last two": [1, 2], "all": [0, 1, 2]}


def new_layer(index: int) -> gka.GatedKalmaNet:
    config = gka.GKAConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    return gka.GatedKalmaNet(config, layer_idx=index)


def hybrid(family: str, layers: list[int], attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    config_class, model_class = FAMILIES[family]
    model = model_class(config_class(**SIZES, attn_implementation=attention))
    for index in layers:
        model.model.layers[index].self_attn = GKASelfAttention(new_layer(index))
    return model.eval()


def tokens(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(2, 61, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_training(family: str, layers: list[int]) -> None:
    model = hybrid(family, layers).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(2):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_the_same_with_and_without_cache(family: str, layers: list[int], attention: str) -> None:
    model, prompt = hybrid(family, layers, attention), tokens()
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0  # pads on the left, as generate wants them
    prompt = prompt.where(mask != 0, 0)
    arguments: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    with_cache = model.generate(prompt, use_cache=True, **arguments)
    assert torch.equal(with_cache, model.generate(prompt, use_cache=False, **arguments))
    alone = model.generate(prompt[:1, 4:], max_new_tokens=12, do_sample=False)
    assert torch.equal(with_cache[:1, 4:], alone)


def test_prefill_in_parts_gives_the_same_logits() -> None:
    model, ids = hybrid("qwen3", [0, 2]), tokens(length=11)
    whole = model(ids).logits
    cache = DynamicCache(config=model.config)
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 5), (5, 6), (6, 11))]
    assert cache.get_seq_length() == 11
    assert relative_error(torch.cat(parts, 1), whole) < 1e-5


@torch.no_grad()
def test_a_copied_cache_goes_on_by_itself() -> None:
    model, ids = hybrid("llama", [0, 1, 2]), tokens(length=8)
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    again = copy.deepcopy(cache)
    expected = model(ids).logits[:, 5:]
    for held in (cache, again):
        assert relative_error(model(ids[:, 5:], past_key_values=held).logits, expected) < 1e-5


def test_a_cache_without_a_configuration_grows() -> None:
    model, ids = hybrid("qwen3", [2]), tokens()
    cache = DynamicCache()
    model(ids[:, :5], past_key_values=cache)
    assert relative_error(model(ids[:, 5:], past_key_values=cache).logits, model(ids).logits[:, 5:]) < 1e-5
    with pytest.raises(ValueError, match="has 3 layers; expected one at 7"):
        GKASelfAttention(new_layer(7))(torch.randn(2, 1, 32), past_key_values=DynamicCache(config=model.config))


def test_packed_sequences() -> None:
    layer = GKASelfAttention(new_layer(0)).eval()
    x = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(2))
    packed, weights = layer(x, cu_seq_lens_q=torch.tensor([0, 4, 10], dtype=torch.int32))
    assert weights is None
    for a, b in ((0, 4), (4, 10)):
        assert relative_error(packed[:, a:b], layer(x[:, a:b])[0]) < 1e-5


def test_masks_say_which_tokens_are_real() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    visible = torch.ones(5, 5).tril().bool() & mask[:, None, None, :].bool()
    added = torch.zeros(2, 1, 5, 5).masked_fill(~visible, torch.finfo(torch.float32).min)
    for given in (mask, visible, added):
        assert torch.equal(real_tokens(given, 5, 0), mask.bool())
    for given in (mask, visible[:, :, -2:], added[:, :, -2:]):
        assert torch.equal(real_tokens(given, 2, 3), mask[:, -2:].bool())


def test_other_masks_are_refused() -> None:
    model, ids = hybrid("qwen3", [1]), tokens(length=6)
    causal = torch.ones(2, 1, 6, 6).tril().bool()
    window = causal & torch.ones(6, 6).triu(-2).bool()
    blocks = causal & (torch.arange(6)[:, None] // 3 == torch.arange(6) // 3)
    for mask in (window, blocks, torch.ones_like(causal)):
        with pytest.raises(ValueError, match="not causal with padding"):
            model(ids, attention_mask={"full_attention": mask})
    with pytest.raises(ValueError, match="has shape"):
        model.model.layers[1].self_attn(torch.randn(2, 6, 32), attention_mask=causal[..., :4])
    layer = model.model.layers[1].self_attn
    with pytest.raises(TypeError, match="attention_mask is a str"):
        layer(torch.randn(2, 6, 32), attention_mask="causal")


def test_caches_it_cannot_use_are_refused() -> None:
    model, ids = hybrid("qwen3", [1]), tokens(length=6)
    layer, x = model.model.layers[1].self_attn, torch.randn(2, 6, 32)
    with pytest.raises(TypeError, match="past_key_values is a tuple"):
        layer(x, past_key_values=())
    with pytest.raises(ValueError, match="expected a DynamicCache"):
        layer(x, past_key_values=StaticCache(config=model.config, max_cache_len=16))
    cache = DynamicCache(config=model.config)
    FAMILIES["qwen3"][1](model.config)(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="holds keys and values at 1"):
        layer(x, past_key_values=cache)
    without = GKASelfAttention(new_layer(0))
    without.gka.layer_idx = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="no layer_idx"):
        without(x, past_key_values=DynamicCache(config=model.config))
