"""The cache goes by the name of whichever transformers there is, and by both names into our models."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from model_helpers import new_cache, tiny_model
from transformers.modeling_outputs import CausalLMOutputWithPast

from gka.hf.cache_name import CACHE, named


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
        assert CACHE in inspect.signature(part.forward).parameters
        assert part(torch.zeros(1, 2, dtype=torch.long), use_cache=True)[CACHE] is not None
    assert CausalLMOutputWithPast(**named("held"))[CACHE] == "held"
