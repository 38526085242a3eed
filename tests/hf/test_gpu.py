"""The models on a CUDA device: `make test-gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import relative_error
from transformers import StaticCache

import gka

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


def decoder(device: torch.device) -> gka.GKAForCausalLM:
    torch.manual_seed(0)
    config = gka.GKAConfig(
        vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    return gka.GKAForCausalLM(config).eval().to(device)


@torch.no_grad()
def test_decoding_compiles_as_one_graph(device: torch.device) -> None:
    """The states stay where they are, as CUDA graphs need them."""
    torch._dynamo.reset()
    model, tokens = decoder(device), torch.randint(0, 50, (2, 9), device=device)
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(tokens[:, :5], past_key_values=cache)
    held = [x for x in cache.layers[0].recurrent_states.values() if x is not None]
    places = [x.data_ptr() for x in held]
    compiled = torch.compile(model.forward, fullgraph=True)
    steps = [
        compiled(
            tokens[:, t : t + 1], past_key_values=cache, position_ids=torch.tensor([[t]], device=device)
        ).logits
        for t in range(5, 9)
    ]
    ref = model(tokens, use_cache=False).logits[:, 5:]
    assert relative_error(torch.cat(steps, dim=1), ref) < 1e-4
    assert [x.data_ptr() for x in cache.layers[0].recurrent_states.values() if x is not None] == places


@torch.no_grad()
def test_generate_equals_the_parallel_form(device: torch.device) -> None:
    """Greedy text, and the logits of every token decoded one by one."""
    model, tokens = decoder(device), torch.randint(0, 50, (2, 12), device=device)
    options: dict[str, Any] = dict(max_new_tokens=16, do_sample=False)
    assert torch.equal(
        model.generate(tokens, use_cache=True, **options), model.generate(tokens, use_cache=False, **options)
    )
    cache = model(tokens[:, :4], use_cache=True).past_key_values
    steps = [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(4, 12)]
    ref = model(tokens, use_cache=False).logits[:, 4:]
    assert relative_error(torch.cat(steps, dim=1), ref) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_equals_the_cpu(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    config = gka.GKAConfig(
        vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    model = gka.GKAForCausalLM(config).eval()
    tokens = torch.randint(0, 50, (2, 40))
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    with torch.no_grad():
        ref = model(tokens, attention_mask=mask).logits[mask.bool()]
        out = model.to(device, dtype)(tokens.to(device), attention_mask=mask.to(device)).logits.cpu()[mask.bool()]
    assert relative_error(out, ref) < (1e-4 if dtype == torch.float32 else 5e-2)
    text = model.generate(tokens.to(device), attention_mask=mask.to(device), max_new_tokens=5, do_sample=False)
    assert text.shape == (2, 45)
