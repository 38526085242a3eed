"""Keywords that callers send to every model of transformers are taken; unknown ones are errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_helpers import random_tokens, tiny_model

from gka import GatedKalmaNet, GKAForSequenceClassification, InPlaceOfAttention

KINDS = ("gka", "hybrid")


def sent() -> dict[str, Any]:
    """What older callers and tokenizers send, for 9 tokens."""
    return dict(cache_position=torch.arange(9), token_type_ids=torch.ones(2, 9, dtype=torch.long))


def models(kind: str) -> dict[str, Any]:
    model = tiny_model(kind)
    model.config.num_labels = 3
    return {
        "causal": model,
        "base": model.model,
        "classifier": GKAForSequenceClassification(model.config).double().eval(),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["causal", "base", "classifier"])
@torch.no_grad()
def test_changes_nothing(name: str, kind: str) -> None:
    model, ids = models(kind)[name], random_tokens(2, 9)
    plain = model(ids)[0]
    for keyword, value in sent().items():
        assert torch.equal(model(ids, **{keyword: value})[0], plain), keyword
    as_tuple = model(ids, return_dict=False, output_hidden_states=True, output_attentions=True, **sent())
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], plain)
    with pytest.raises(TypeError, match="unexpected keyword argument 'cache_positions'"):
        model(ids, cache_positions=1)


@torch.no_grad()
def test_the_former_name_of_logits_to_keep() -> None:
    model, ids = tiny_model(), random_tokens(2, 9)
    assert torch.equal(model(ids, num_logits_to_keep=2).logits, model(ids, logits_to_keep=2).logits)


def test_in_place_of_attention() -> None:
    layer, x = InPlaceOfAttention(GatedKalmaNet(32, 4, layer_idx=0)), torch.randn(2, 9, 32)
    plain, _ = layer(x)
    out, _ = layer(x, use_cache=True, output_attentions=False, num_items_in_batch=torch.tensor(9), **sent())
    assert torch.equal(out, plain)
    with pytest.raises(TypeError, match="unexpected keyword argument 'past_key_value'"):
        layer(x, past_key_value=None)
