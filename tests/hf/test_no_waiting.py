"""On a GPU nothing in front of the blocks waits for values: masks and packings are taken as they are.

The CPU is taken for a device that makes one wait, and the operators that read values are watched.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from model_helpers import FULL, GKA, tiny_config
from reads import Reads

from gka import GKAForCausalLM
from gka.hf import inputs
from gka.hf.inputs import padding_mask
from gka.hf.packing import find_packing, find_packing_in_mask
from gka.nn import layer
from gka.nn.padding import check_mask
from gka.ops import checks


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What has been read so far."""
    monkeypatch.delenv("GKA_CHECK_VALUES", raising=False)
    monkeypatch.setattr(checks, "NEVER_WAITING", ())
    with Reads() as watch:
        yield watch.seen


def test_a_mask_is_not_read_on_a_gpu(reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recent = padding_mask(torch.ones(2, 7), 5)
    assert recent is not None and recent.shape == (2, 5) and not reads
    monkeypatch.setenv("GKA_CHECK_VALUES", "1")
    assert padding_mask(torch.ones(2, 7), 5) is None and reads


def test_on_the_cpu_a_mask_without_pads_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GKA_CHECK_VALUES", raising=False)
    mask = torch.tensor([[0, 1, 1]])
    assert padding_mask(mask, 2) is None and padding_mask(mask, 3) is not None


def test_lengths_of_a_packed_batch_are_not_read_on_a_gpu(reads: list[str]) -> None:
    packing = find_packing((1, 9), torch.tensor([0, 4, 9]), None, None)
    assert packing is not None and packing.positions.shape == (1, 9) and not reads


def test_masks_and_positions_of_a_padded_batch_are_not_read_on_a_gpu(reads: list[str]) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert find_packing_in_mask(mask, (mask.cumsum(1) - 1).clamp(min=0)) is None
    check_mask(mask)
    assert not reads


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_training_reads_nothing(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward pass; masks of softmax attention are transformers' own, which reads them."""
    monkeypatch.delenv("GKA_CHECK_VALUES", raising=False)
    torch.manual_seed(0)
    model = GKAForCausalLM(tiny_config(num_hidden_layers=2, layer_types=[GKA, GKA]))
    tokens = torch.randint(1, 60, (1, 18) if packed else (2, 9))
    batch = {"input_ids": tokens, "labels": tokens}
    if packed:
        batch["cu_seq_lens_q"] = torch.tensor([0, 4, 18])
    else:
        batch["attention_mask"] = torch.tensor([[0, 0, *[1] * 7], [1] * 9])
    model(**batch).loss.backward()  # tables are made once
    monkeypatch.setattr(checks, "NEVER_WAITING", ())
    with Reads() as watch:
        model(**batch).loss.backward()
    assert not watch.seen


@pytest.mark.parametrize("types", [[GKA, GKA], [GKA, FULL]])
def test_generate_with_unread_masks(types: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens; and pads are put aside for the prompt alone, once in each GKA layer."""
    torch.manual_seed(0)
    model = GKAForCausalLM(tiny_config(num_hidden_layers=2, layer_types=types)).eval()
    tokens = torch.randint(1, 60, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    settings = dict(attention_mask=mask, do_sample=False, max_new_tokens=6, min_new_tokens=6, pad_token_id=0)
    read = model.generate(tokens, **settings)
    calls = []
    real_first = layer.RealFirst
    monkeypatch.setattr(inputs, "values_may_be_read", lambda _: False)
    monkeypatch.setattr(layer, "RealFirst", lambda mask, n: calls.append(mask.shape) or real_first(mask, n))
    assert torch.equal(model.generate(tokens, **settings), read)
    assert calls == [(2, 5)] * types.count(GKA)
    calls.clear()
    assert torch.equal(model.generate(tokens, prefill_chunk_size=1, **settings), read)
    assert calls == [(2, 1)] * 5 * types.count(GKA)
