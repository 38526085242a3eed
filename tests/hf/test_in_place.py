"""The layer in place of `self_attn` in models of transformers: training, generation, masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_helpers import assert_near
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from gka import GatedKalmaNet, InPlaceOfAttention

MODELS: dict[str, Any] = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


def model_of(family: str, layers: tuple[int, ...], attention: str = "sdpa", **fields: Any) -> Any:
    torch.manual_seed(0)
    make_config, make_model = MODELS[family]
    config = make_config(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, pad_token_id=0, eos_token_id=None,
        attn_implementation=attention, **fields,
    )  # fmt: skip
    model = make_model(config).double()
    for index in layers:
        layer = GatedKalmaNet(32, 4, 2, initializer_range=0.3, layer_idx=index, dtype=torch.float64)
        model.model.layers[index].self_attn = InPlaceOfAttention(layer)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layers", [(1,), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_trains_and_generates(family: str, layers: tuple[int, ...]) -> None:
    model, ids = model_of(family, layers), tokens(2, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    before = model(ids, labels=ids).loss
    before.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    model.eval()
    with torch.no_grad():
        assert model(ids, labels=ids).loss < before
        mask = torch.ones_like(ids)
        ids[1, :3] = mask[1, :3] = 0
        found = [
            model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        ]
        assert torch.equal(*found) and found[0].shape == (2, 15)
        alone = model.generate(ids[1:, 3:], max_new_tokens=6, do_sample=False)
        assert torch.equal(found[0][1, 3:], alone[0]), "pads are not seen"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_cache_gives_the_same_logits(attention: str) -> None:
    model, ids = model_of("qwen3", (0, 2), attention).eval(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    cache, parts = DynamicCache(config=model.config), []
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        done = 0
        for length in (4, 1, 3, 1):
            done += length
            part = ids[:, done - length : done]
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, done - length : done]
            out = model(part, attention_mask=mask[:, :done], past_key_values=cache, position_ids=positions)
            parts.append(out.logits)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
    assert cache.get_seq_length() == 9
    for row, first in ((0, 2), (1, 0)):
        assert_near(torch.cat(parts, dim=1)[row, first:], whole[row, first:], 1e-9, f"row {row}")


def test_beam_search_keeps_states_and_rows_together() -> None:
    model, ids = model_of("llama", (0, 1)).eval(), tokens(2, 7)
    found = [
        model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False, use_cache=c) for c in (True, False)
    ]
    assert torch.equal(*found)


def masks() -> dict[str, Tensor]:
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    both = torch.ones(5, 5, dtype=torch.bool)
    window = causal & ~causal.tril(-2)
    packed = causal.clone()
    packed[3:, :3] = False
    return {"both ways": both, "window": window, "packed": packed}


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("name", masks())
def test_refuses_masks_that_are_not_causal(name: str, added: bool) -> None:
    mask = masks()[name].expand(2, 1, 5, 5)
    if added:
        mask = torch.zeros(2, 1, 5, 5).masked_fill(~mask, torch.finfo(torch.float32).min)
    layer = InPlaceOfAttention(GatedKalmaNet(32, 4, layer_idx=0))
    with pytest.raises(ValueError, match="expected a causal mask with padding"):
        layer(torch.randn(2, 5, 32), attention_mask=mask)


def test_refuses_a_window_in_a_decode_step() -> None:
    layer, cache = InPlaceOfAttention(GatedKalmaNet(32, 4, layer_idx=0)), DynamicCache()
    x = torch.randn(1, 4, 32)
    layer(x[:, :3], past_key_values=cache)
    with pytest.raises(ValueError, match="expected a causal mask with padding"):
        layer(x[:, 3:], past_key_values=cache, attention_mask=torch.tensor([[[[False, True, True, True]]]]))


def test_refuses_the_rest() -> None:
    layer, x = InPlaceOfAttention(GatedKalmaNet(32, 4, layer_idx=0)), torch.randn(2, 5, 32)
    with pytest.raises(ValueError, match="layer_idx is None"):
        InPlaceOfAttention(GatedKalmaNet(32, 4))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        layer(x, attention_mask=torch.ones(2, 1, 5, 6))
    with pytest.raises(TypeError, match="attention_mask is a list"):
        layer(x, attention_mask=[1])
    with pytest.raises(ValueError, match="is_causal is False"):
        layer(x, is_causal=False)
    used = DynamicCache()
    used.update(torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 8), 0)
    with pytest.raises(ValueError, match="expected an unused layer"):
        layer(x, past_key_values=used)
