"""Models on the meta device and of fake tensors: shapes of logits and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_helpers import tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

from gka import GKAForCausalLM

TOLD = {
    "rows": {},
    "padded": {"attention_mask": [[0, 0, 1, 1, 1, 1]]},
    "cu_seq_lens_q": {"cu_seq_lens_q": [0, 2, 6]},
    "position_ids": {"position_ids": [[0, 1, 0, 1, 2, 3]]},
    "seq_idx": {"seq_idx": [[0, 0, 1, 1, 1, 1]]},
}


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
@pytest.mark.parametrize("name", TOLD)
def test_forward_and_backward(name: str, fake: bool) -> None:
    model: Any = tiny_model("gka")
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.device("meta"):
        model = type(model)(model.config)
        tokens = torch.zeros(1, 6, dtype=torch.long)
        told = {key: torch.tensor(value) for key, value in TOLD[name].items()}
        logits = model(tokens, use_cache=False, **told).logits
        logits.sum().backward()
    assert logits.shape == (1, 6, model.config.vocab_size)
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_the_loss_in_chunks(fake: bool) -> None:
    config = tiny_model("gka").config
    with FakeTensorMode() if fake else torch.device("meta"):
        model = GKAForCausalLM(config)
        model.set_loss_chunk(4)
        tokens = torch.zeros(2, 7, dtype=torch.long)
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
    assert loss.shape == ()
    assert all(p.grad.shape == p.shape for p in model.parameters())
