"""The cache goes by the name of whichever transformers there is, and by both names into our models."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from model_helpers import new_cache, tiny_config, tiny_model

from gka import GKAForSequenceClassification
from gka.hf.cache_name import CACHE


@pytest.mark.parametrize("kind", ["gka", "hybrid"])
def test_both_names_are_one_argument(kind: Any) -> None:
    model = tiny_model(kind)
    tokens = torch.randint(0, model.config.vocab_size, (1, 7))
    whole = model(tokens).logits
    for name in ("cache", "past_key_values"):
        for part in (model, model.model):
            cache = new_cache(model.config)
            part(tokens[:, :4], **{name: cache})
            rest = part(tokens[:, 4:], **{name: cache})
            hidden = rest.logits if part is model else model.lm_head(rest.last_hidden_state)
            torch.testing.assert_close(hidden, whole[:, 4:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="are both given"):
        model(tokens, cache=cache, past_key_values=cache)


def test_signature_and_outputs_have_the_name_of_this_transformers() -> None:
    model = tiny_model("gka")
    for part in (model, model.model):
        assert {"cache", "past_key_values"} & set(inspect.signature(part.forward).parameters) == {CACHE}
        assert part(torch.zeros(1, 2, dtype=torch.long), use_cache=True)[CACHE] is not None


def test_a_classifier_takes_both_names() -> None:
    model = GKAForSequenceClassification(tiny_config(pad_token_id=0)).eval()
    tokens = torch.randint(1, model.config.vocab_size, (1, 5))
    expected = model(tokens).logits
    for name in ("cache", "past_key_values"):
        cache = new_cache(model.config)
        torch.testing.assert_close(model(tokens, **{name: cache}).logits, expected, rtol=1e-4, atol=1e-5)
        assert cache.has_previous_state()
