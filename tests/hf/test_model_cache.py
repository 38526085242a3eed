"""Going on from a cache equals computing everything anew: token by token, in chunks, through generate."""

from __future__ import annotations

import copy

import pytest
import torch
from model_helpers import KINDS, assert_near, cache_tensors, new_cache, random_tokens, tiny_model
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM, StaticCache

BOUND = 1e-6  # RMSNorm, softmax and rotary embedding are transformers', in float32


@pytest.mark.parametrize("kind", list(KINDS))
@torch.no_grad()
def test_token_by_token(kind: str) -> None:
    model, tokens = tiny_model(kind), random_tokens(2, 17)
    full = model(tokens, use_cache=False).logits
    cache, steps = None, []
    for t in range(tokens.shape[1]):
        out = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
        if t % 8 == 4:  # recompute from the start, at a few lengths
            assert_near(out.logits, model(tokens[:, : t + 1], use_cache=False).logits[:, -1:], BOUND, f"token {t}")
    assert_near(torch.cat(steps, dim=1), full, BOUND)
    assert cache is not None and cache.get_seq_length() == 17


@pytest.mark.parametrize("kind", list(KINDS))
@torch.no_grad()
def test_chunks(kind: str) -> None:
    model, tokens = tiny_model(kind), random_tokens(2, 23)
    cache = new_cache(model.config)
    parts = [
        model(part, past_key_values=cache, use_cache=True).logits for part in tokens.split([7, 1, 2, 12, 1], dim=1)
    ]
    assert_near(torch.cat(parts, dim=1), model(tokens, use_cache=False).logits, BOUND)


@pytest.mark.parametrize("kind", ["gka", "gla", "hybrid", "hybrid, sliding"])
@torch.no_grad()
def test_cache_on_or_off(kind: str) -> None:
    model, tokens = tiny_model(kind), random_tokens(2, 13)
    on, off = model(tokens, use_cache=True), model(tokens, use_cache=False)
    assert off.past_key_values is None and on.past_key_values is not None
    assert torch.equal(on.logits, off.logits)
    ids = [model.generate(tokens, max_new_tokens=12, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(ids[0], ids[1])


@pytest.mark.parametrize("kind", ["gka", "hybrid", "hybrid, sliding"])
@pytest.mark.parametrize("beams", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
@torch.no_grad()
def test_beam_search(kind: str, beams: dict[str, int]) -> None:
    model, tokens = tiny_model(kind, eos_token_id=5), random_tokens(2, 6)
    options = dict(max_new_tokens=10, do_sample=False, **beams)
    cached = model.generate(tokens, use_cache=True, **options)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))
    greedy = model.generate(tokens, max_new_tokens=10, do_sample=False)
    assert not torch.equal(cached[:: beams.get("num_return_sequences", 1), : greedy.shape[1]], greedy)


@pytest.mark.parametrize("kind", ["gka", "hybrid", "hybrid, sliding"])
@torch.no_grad()
def test_generate_in_chunks_and_from_a_cache(kind: str) -> None:
    model, tokens = tiny_model(kind), random_tokens(2, 11)
    options = dict(max_new_tokens=8, do_sample=False)
    expected = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, prefill_chunk_size=4, **options), expected)
    cache = new_cache(model.config)
    model(tokens[:, :7], past_key_values=cache, use_cache=True)
    kept = copy.deepcopy(cache)
    assert torch.equal(model.generate(tokens, past_key_values=cache, **options), expected)
    assert kept.get_seq_length() == 7
    assert torch.equal(model.generate(tokens, past_key_values=kept, **options), expected)


@pytest.mark.parametrize("kind", ["gka", "hybrid", "hybrid, sliding"])
@torch.no_grad()
def test_generate_goes_on_from_its_own_cache(kind: str) -> None:
    model, tokens = tiny_model(kind), random_tokens(2, 9)
    expected = model.generate(tokens, max_new_tokens=10, do_sample=False)
    first = model.generate(tokens, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    rest = model.generate(
        first.sequences, max_new_tokens=6, do_sample=False, past_key_values=first.past_key_values
    )
    assert torch.equal(rest, expected)


@pytest.mark.parametrize("kind", ["gka", "hybrid"])
@torch.no_grad()
def test_generate_from_embeddings(kind: str) -> None:
    model, tokens = tiny_model(kind), random_tokens(2, 9)
    options = dict(max_new_tokens=6, do_sample=False)
    embeddings = model.get_input_embeddings()(tokens)
    expected = model.generate(tokens, **options)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **options), expected[:, 9:])
    assert torch.equal(model.generate(tokens, inputs_embeds=embeddings, **options), expected)


@pytest.mark.parametrize("kind", ["gka", "hybrid", "hybrid, sliding"])
@torch.no_grad()
def test_a_new_cache_and_generate(kind: str) -> None:
    model, tokens = tiny_model(kind), random_tokens(2, 11)
    expected = model.generate(tokens, max_new_tokens=6, do_sample=False)
    given = model.generate(tokens, max_new_tokens=6, do_sample=False, past_key_values=new_cache(model.config))
    assert torch.equal(given, expected)
    static = model.generate(tokens, max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(static, expected)


@pytest.mark.parametrize("kind", ["gka", "hybrid"])
@torch.no_grad()
def test_static_cache(kind: str) -> None:
    model, tokens = tiny_model(kind), random_tokens(2, 9)
    cache = StaticCache(config=model.config, max_cache_len=16)
    parts = [
        model(part, past_key_values=cache, use_cache=True).logits for part in tokens.split([5, 1, 2, 1], dim=1)
    ]
    assert_near(torch.cat(parts, dim=1), model(tokens, use_cache=False).logits, BOUND)


@torch.no_grad()
def test_rows_of_a_cache_move() -> None:
    model, tokens = tiny_model("hybrid"), random_tokens(3, 9)
    cache = model(tokens[:, :8], use_cache=True).past_key_values
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    moved = model(tokens[order, 8:], past_key_values=cache, use_cache=True).logits
    assert_near(moved, model(tokens, use_cache=False).logits[order, -1:], BOUND)


@pytest.mark.parametrize("kind", ["gka", "gla", "hybrid"])
@torch.no_grad()
def test_what_a_cache_holds(kind: str) -> None:
    model = tiny_model(kind, torch.bfloat16)
    cache = model(random_tokens(2, 5), use_cache=True).past_key_values
    held = cache_tensors(cache)
    S_kk = {"0 recurrent_states 0": (2, 4, 10, 10)} if kind != "gla" else {}
    expected = {
        "0 conv_states 0": (2, 40, 3),
        "0 conv_states 1": (2, 20, 3),
        "0 conv_states 2": (2, 20, 3),
        "0 recurrent_states 1": (2, 4, 10, 10),
        **S_kk,
    }
    assert {name: tuple(tensor.shape) for name, tensor in held.items() if name[0] == "0"} == expected
    for name, tensor in held.items():
        assert tensor.dtype == (torch.float32 if "recurrent" in name else torch.bfloat16), name
    assert cache.has_previous_state() and cache.get_seq_length() == 5


@torch.no_grad()
def test_a_cache_of_gka_layers_cannot_be_cropped() -> None:
    model = tiny_model()
    cache = model(random_tokens(1, 5), use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="crop"):
        cache.crop(-1)
    cache.activate_past_recording()  # the way that transformers names
    with pytest.raises(ValueError, match="a GKA layer's state cannot be rolled back"):
        model(random_tokens(1, 1), past_key_values=cache)


def test_refuses_a_cache_without_the_configuration() -> None:
    with pytest.raises(ValueError, match=r"config=model\.config"):
        tiny_model()(random_tokens(1, 3), past_key_values=DynamicCache())
    with pytest.raises(TypeError, match=r"a tuple; expected a transformers\.Cache"):
        tiny_model()(random_tokens(1, 3), past_key_values=())


def test_refuses_assisted_generation() -> None:
    model, tokens = tiny_model(), random_tokens(1, 5)
    options = dict(max_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tokens, assistant_model=model, **options)
    sizes = dict(vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8)
    assisted = Qwen3ForCausalLM(Qwen3Config(num_attention_heads=2, num_key_value_heads=1, **sizes)).double()
    with pytest.raises((ValueError, RuntimeError), match=r"cannot be rolled back|`crop` was called"):
        assisted.generate(tokens, assistant_model=model, **options)
