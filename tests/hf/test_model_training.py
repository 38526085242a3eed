"""Training: checkpointing, losses, caches left on, low precision, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import relative_error
from model_helpers import (
    FULL,
    GKA,
    assert_near,
    new_cache,
    parameter_gradients,
    random_tokens,
    tiny_config,
    tiny_model,
)
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from gka import GKAForCausalLM
from gka.hf.block import RMSNorm, cast_once
from gka.hf.cache_name import named

KINDS = ("gka", "gla", "hybrid", "hybrid, sliding")


def loss_and_gradients(model: GKAForCausalLM, tokens: Tensor, **options: object) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(tokens, labels=tokens, **options).loss
    loss.backward()
    return {"loss": loss.detach(), **parameter_gradients(model)}


def assert_same(out: dict[str, Tensor], ref: dict[str, Tensor], bound: float) -> None:
    assert out.keys() == ref.keys()
    for name in ref:
        assert_near(out[name], ref[name], bound, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(kind: str, reentrant: bool) -> None:
    model, tokens = tiny_model(kind).train(), random_tokens(2, 19)
    expected = loss_and_gradients(model, tokens, use_cache=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    runs = []
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    assert_same(loss_and_gradients(model, tokens, use_cache=True), expected, 1e-12)
    assert len(runs) == 2 * len(model.model.layers)  # once forward, once again for the gradients
    out = model(tokens, use_cache=True)
    assert out.past_key_values is None
    cache = new_cache(model.config)
    assert_same(loss_and_gradients(model, tokens, **named(cache)), expected, 1e-12)
    if "linear_attention" in model.config.layer_types:
        assert not cache.has_previous_state()
    else:
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_does_not_disturb_gradients(kind: str) -> None:
    model, tokens = tiny_model(kind).train(), random_tokens(2, 19)
    expected = loss_and_gradients(model, tokens, use_cache=False)
    assert_same(loss_and_gradients(model, tokens, use_cache=True), expected, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_a_cache(kind: str) -> None:
    model, tokens = tiny_model(kind).train(), random_tokens(2, 12)
    grads = []
    for parts in (tokens.split([5, 4, 1, 1, 1], dim=1), [tokens]):
        model.zero_grad()
        cache, logits = None, []
        for part in parts:
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        torch.nn.functional.cross_entropy(torch.cat(logits, dim=1).flatten(0, 1), tokens.flatten()).backward()
        grads.append(parameter_gradients(model))
    assert_same(grads[0], grads[1], 1e-5)


def test_loss_is_shifted_and_counted() -> None:
    model, tokens = tiny_model("hybrid"), random_tokens(2, 9)
    out = model(tokens, labels=tokens)
    by_hand = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    assert_near(out.loss, by_hand, 1e-6)
    total = model(tokens, labels=tokens, num_items_in_batch=torch.tensor(5)).loss
    assert_near(total, by_hand * 16 / 5, 1e-6)
    ignored = tokens.clone()
    ignored[0] = -100
    one = model(tokens[1:], labels=tokens[1:]).loss
    assert_near(model(tokens, labels=ignored).loss, one, 1e-6)
    shifted = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    assert_near(model(tokens, labels=tokens, shift_labels=shifted).loss, by_hand, 1e-6)


def test_embeddings_in_place_of_tokens() -> None:
    model, tokens = tiny_model("hybrid"), random_tokens(2, 9)
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    out = model(inputs_embeds=embeddings)
    assert torch.equal(out.logits, model(tokens).logits)
    out.logits.sum().backward()
    assert embeddings.grad is not None and embeddings.grad.abs().sum() > 0
    for arguments in ({}, {"input_ids": tokens, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="expected one of them"):
            model(**arguments)


def test_which_logits_and_which_outputs() -> None:
    model, tokens = tiny_model("hybrid"), random_tokens(2, 9)
    model.set_attn_implementation("eager")
    out = model(tokens, output_hidden_states=True, output_attentions=True)
    assert_near(model(tokens, logits_to_keep=2).logits, out.logits[:, -2:], 1e-12)
    assert_near(model(tokens, logits_to_keep=torch.tensor([3, 0])).logits, out.logits[:, [3, 0]], 1e-12)
    assert len(out.hidden_states) == 4 and len(out.attentions) == 1
    assert_near(model.lm_head(out.hidden_states[-1]), out.logits, 1e-12)
    assert_near(out.attentions[0].sum(-1), torch.ones(2, 4, 9), 1e-6)
    as_tuple = model(tokens, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], out.logits)


SHALLOW = {"gka": [GKA], "gla": [GKA], "hybrid": [GKA, FULL]}  # what rounding does, not what depth makes of it


def assert_like_float32(low: dict[str, Tensor], high: dict[str, Tensor]) -> None:
    assert all(value.isfinite().all() for value in low.values())
    assert_near(low.pop("loss"), high.pop("loss"), 1e-2)
    flat = [torch.cat([value.float().flatten() for value in found.values()]) for found in (low, high)]
    assert_near(flat[0], flat[1], 8e-2)


@pytest.mark.parametrize("kind", list(SHALLOW))
def test_bfloat16(kind: str) -> None:
    low = tiny_model(kind, torch.bfloat16, layer_types=SHALLOW[kind], initializer_range=0.1).train()
    high, tokens = copy.deepcopy(low).float(), random_tokens(2, 45)
    assert_like_float32(loss_and_gradients(low, tokens), loss_and_gradients(high, tokens))
    assert_near(low(tokens).logits, high(tokens).logits, 3e-2)


@pytest.mark.parametrize("kind", list(SHALLOW))
def test_autocast(kind: str) -> None:
    model = tiny_model(kind, torch.float32, layer_types=SHALLOW[kind], initializer_range=0.1).train()
    tokens = random_tokens(2, 45)
    high = loss_and_gradients(model, tokens)
    model.zero_grad()
    cache = new_cache(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels=tokens, past_key_values=cache).loss
        step = model(tokens[:, :1], past_key_values=cache).logits
    loss.backward()
    assert_like_float32({"loss": loss.detach(), **parameter_gradients(model)}, high)
    expected = model(torch.cat([tokens, tokens[:, :1]], dim=1)).logits[:, -1:]
    assert_near(step, expected, 3e-2)


@pytest.mark.parametrize("kind", ["gka", "hybrid, attention first"])
def test_autocast_casts_the_input_of_projections_once(kind: str) -> None:
    """One copy for the backward pass, not one for each projection; float64 stays as it is."""
    block = tiny_model(kind, torch.float32).model.layers[0]
    mixer = block.gka if kind == "gka" else block.self_attn
    seen: dict[str, list[Tensor]] = {"mixer": [], "mlp": []}
    for where, modules in (
        ("mixer", (mixer.q_proj, mixer.k_proj, mixer.v_proj)),
        ("mlp", (block.mlp.gate_proj, block.mlp.up_proj)),
    ):
        for module in modules:
            module.register_forward_pre_hook(lambda _, args, where=where: seen[where].append(args[0]))
    x = torch.randn(2, 5, 36)
    angles = {"position_embeddings": (torch.ones(1, 5, 10), torch.zeros(1, 5, 10))}
    with torch.autocast("cpu", torch.bfloat16):
        block(x, attention_arguments=angles)
    for inputs in seen.values():
        assert {tensor.data_ptr() for tensor in inputs} == {inputs[0].data_ptr()}
        assert inputs[0].dtype == torch.bfloat16
    assert cast_once(x) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert cast_once(x.double()).dtype == torch.float64


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    model, tokens = tiny_model("hybrid").train(), random_tokens(2, 19)
    expected = loss_and_gradients(model, tokens, use_cache=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    assert_same({"loss": loss.detach(), **parameter_gradients(model)}, expected, 1e-10)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=256, initializer_range=0.02, tie_word_embeddings=False)
    model = GKAForCausalLM(tiny_config("hybrid", **sizes))
    for name, value in model.named_parameters():
        if name.endswith("norm.weight"):
            assert value.eq(1.0).all(), name
        elif name.endswith("bias") and "dt_" not in name:
            assert value.eq(0.0).all(), name
        elif name.endswith("conv1d.weight"):  # U(-1, 1) / sqrt(width), width 4: keeps the size of its inputs
            assert value.abs().max() <= 0.5 and 0.25 < value.std() < 0.33, name
        elif name.endswith("weight"):
            assert 0.017 < value.std() < 0.023, name


def test_norm_under_autocast() -> None:
    norm = RMSNorm(37, eps=1e-5)
    with torch.no_grad():
        norm.weight.normal_()
    x = (3 * torch.randn(2, 5, 37)).requires_grad_()
    cotangent = torch.randn(2, 5, 37)

    def results(autocast: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = norm(x)
        return [y, *torch.autograd.grad(y, [x, norm.weight], cotangent)]

    for found, expected in zip(results(True), results(False), strict=True):
        assert found.dtype == torch.float32
        assert relative_error(found, expected) < 1e-6
    # Without autocast and in 16 bits it is transformers' own.
    theirs = Qwen3RMSNorm(37, eps=1e-5)
    theirs.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), theirs(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x.bfloat16()), theirs(x.bfloat16()))
