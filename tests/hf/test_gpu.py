"""The models on a CUDA device: `make test-gpu`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import relative_error
from transformers import StaticCache

import gka
from gka.hf.loss import chunked_loss

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


def test_the_loss_in_chunks(device: torch.device) -> None:
    """As exact as the plain loss, with less memory, and without a wait for the device."""
    torch.manual_seed(0)
    B, T, hidden, vocabulary, chunk = 4, 1024, 256, 16000, 512
    head = torch.nn.Linear(hidden, vocabulary, bias=False, device=device)
    x = torch.randn(B, T, hidden, device=device, requires_grad=True)
    labels = torch.randint(0, vocabulary, (B, T), device=device)

    def plain(x: torch.Tensor, head: torch.nn.Module = head) -> torch.Tensor:
        logits = head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def ours(x: torch.Tensor) -> torch.Tensor:
        return chunked_loss(head, x, labels, chunk)

    ours(x).backward()  # warm up
    x.grad = head.weight.grad = None
    found, peaks = [], []
    for loss_of in (plain, ours):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error" if loss_of is ours else "default")
        try:
            with torch.autocast("cuda", torch.bfloat16):
                loss = loss_of(x)
            grads = torch.autograd.grad(loss, [x, head.weight])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        peaks.append(torch.cuda.max_memory_allocated() - before)
        found.append([loss.detach(), *grads])
    wide = copy.deepcopy(head).double()
    x64 = x.detach().double().requires_grad_()
    loss = plain(x64, wide)
    reference = [loss.detach(), *torch.autograd.grad(loss, [x64, wide.weight])]
    for base, out, ref in zip(found[0], found[1], reference, strict=True):
        assert relative_error(out, ref) <= 1.1 * relative_error(base, ref) + 1e-6
    assert peaks[1] < peaks[0] / 3
