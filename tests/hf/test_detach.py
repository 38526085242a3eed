"""Backpropagation through a part of a sequence: gradients stop at a detached state or cache, numbers stay."""

from __future__ import annotations

import pytest
import torch
from model_helpers import (
    assert_near,
    cache_tensors,
    new_cache,
    parameter_gradients,
    random_inputs,
    random_tokens,
    tiny_layer,
    tiny_model,
)

from gka import LayerState, detach_cache


@pytest.mark.parametrize("mixer", ["gka", "gla"])
def test_the_state_of_a_layer(mixer: str) -> None:
    layer, x = tiny_layer(mixer=mixer), random_inputs(2, 11, 36).requires_grad_()
    _, state = layer(x[:, :6], return_state=True)
    cut = state.detach()
    assert isinstance(cut, LayerState) and state.conv[0].requires_grad and state.state.S_kv.requires_grad
    outs = [layer(x[:, 6:], state=s) for s in (state, cut)]
    assert torch.equal(*outs)
    through, stopped = (torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in outs)
    assert through[:, :6].norm() > 1e-3 and (stopped[:, :6] == 0).all()
    assert_near(stopped[:, 6:], through[:, 6:], 1e-9)


@pytest.mark.parametrize("kind", ["gka", "gla", "hybrid", "hybrid, sliding"])
def test_a_cache(kind: str) -> None:
    """As with a cache that was filled without gradients; and a second backward pass meets no freed graph."""
    model, ids = tiny_model(kind), random_tokens(2, 15)
    model.train()
    grads = []
    for detached in (True, False):
        cache = new_cache(model.config)
        for number, part in enumerate(ids.split(5, dim=1)):
            model.zero_grad()
            if detached:
                if number:
                    before = {name: value.clone() for name, value in cache_tensors(cache).items()}
                    detach_cache(cache)
                    held = cache_tensors(cache)
                    assert held.keys() == before.keys()
                    for name, value in held.items():
                        assert torch.equal(value, before[name]) and not value.requires_grad, name
                model(part, labels=part, past_key_values=cache).loss.backward()
            elif number < 2:
                with torch.no_grad():
                    model(part, past_key_values=cache)
            else:
                model(part, labels=part, past_key_values=cache).loss.backward()
        grads.append(parameter_gradients(model))
    for name in grads[0]:
        assert_near(grads[0][name], grads[1][name], 1e-6, name)


def test_one_backward_pass_over_detached_parts() -> None:
    """The losses may be added up: what the next part writes leaves the graph of the last alone."""
    model, ids = tiny_model("hybrid"), random_tokens(2, 9)
    cache, losses = new_cache(model.config), []
    for part in ids.split([4, 1, 4], dim=1):
        losses.append(model(part, past_key_values=cache).logits.square().mean())
        detach_cache(cache)
    sum(losses).backward()
    assert all(value.isfinite().all() for value in parameter_gradients(model).values())


def test_without_detaching_gradients_flow_and_a_second_pass_fails() -> None:
    model, ids = tiny_model(), random_tokens(2, 9)
    cache = new_cache(model.config)
    model(ids[:, :5], labels=ids[:, :5], past_key_values=cache).loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        model(ids[:, 5:], labels=ids[:, 5:], past_key_values=cache).loss.backward()
