"""Packing that a mask's numbers or positions beside a mask tell: as the single sequences, or an error; no leak."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_helpers import (
    PAD,
    assert_near,
    new_cache,
    parameter_gradients,
    random_inputs,
    random_tokens,
    tiny_layer,
    tiny_model,
)
from torch import Tensor

from gka import GatedKalmaNet, GKAForSequenceClassification, InPlaceOfAttention
from gka.hf.packing import find_packing_in_mask
from gka.ops import checks

BOUND = 1e-6
KINDS = ("gka", "gla", "hybrid", "hybrid, sliding", "hybrid, all three")
# Two rows of 12 tokens: numbers of sequences, 0 for a pad.
ROWS = ((1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 0, 0), (0, 0, 1, 1, 1, 1, 0, 2, 4, 4, 4, 4))


def numbers() -> Tensor:
    return torch.tensor(ROWS)


def positions() -> Tensor:
    """Of each token in its sequence, as collators give them; those of pads are of no use."""
    rows = [[sum(n == row[t] for n in row[:t]) for t in range(len(row))] for row in ROWS]
    return torch.tensor(rows).masked_fill(numbers() == 0, 7)


def ways() -> dict[str, dict[str, Tensor]]:
    ones = (numbers() != 0).long()
    return {
        "numbers": dict(attention_mask=numbers()),
        "numbers as floats, positions": dict(attention_mask=numbers().double(), position_ids=positions()),
        "positions": dict(attention_mask=ones, position_ids=positions()),
        "positions from 1": dict(attention_mask=ones.bool(), position_ids=positions() + 1),
    }


def tokens() -> Tensor:
    return random_tokens(2, 12).masked_fill(numbers() == 0, PAD)


def sequences() -> list[tuple[int, Tensor]]:
    """Row and places of each sequence."""
    return [
        (row, (numbers()[row] == number).nonzero().squeeze(1))
        for row in range(2)
        for number in sorted(set(ROWS[row]) - {0})
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", list(ways()))
@torch.no_grad()
def test_packed_equals_single(kind: str, way: str, attention: str) -> None:
    model = tiny_model(kind)
    model.set_attn_implementation(attention)
    out = model(tokens(), **ways()[way])
    assert out.logits.isfinite().all() and out.past_key_values is None
    for row, places in sequences():
        single = model(tokens()[row, places].unsqueeze(0), use_cache=False).logits[0]
        assert_near(out.logits[row, places], single, BOUND, f"row {row}, tokens {places.tolist()}")


@torch.no_grad()
def test_positions_and_a_mask_of_ones() -> None:
    for kind in KINDS:
        model, ids = tiny_model(kind), random_tokens(1, 9)
        told = dict(attention_mask=torch.ones(1, 9), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]]))
        single = torch.cat([model(part).logits for part in ids.split([4, 2, 3], dim=1)], dim=1)
        assert_near(model(ids, **told).logits, single, BOUND, kind)


def test_gradients() -> None:
    model, grads = tiny_model("hybrid"), []
    for packed in (True, False):
        model.zero_grad()
        if packed:
            logits = model(tokens(), use_cache=False, **ways()["numbers"]).logits
            found = torch.cat([logits[row, places] for row, places in sequences()])
        else:
            found = torch.cat([model(tokens()[r, p].unsqueeze(0)).logits[0] for r, p in sequences()])
        torch.nn.functional.cross_entropy(found, torch.arange(len(found))).backward()
        grads.append(parameter_gradients(model))
    for name in grads[0]:
        assert_near(grads[0][name], grads[1][name], 1e-5, name)


@torch.no_grad()
def test_a_classifier_reads_the_last_sequence() -> None:
    torch.manual_seed(0)
    config = tiny_model("hybrid").config
    config.num_labels = 3
    model = GKAForSequenceClassification(config).double().eval()
    for way in ways().values():
        logits = model(tokens(), **way).logits
        for row, places in (sequences()[2], sequences()[-1]):
            assert_near(logits[row], model(tokens()[row, places].unsqueeze(0)).logits[0], BOUND)


def test_a_padded_batch_with_positions_is_no_packed_one() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    for pad in (0, 1, 9):
        counted = (mask.cumsum(1) - 1).masked_fill(mask == 0, pad)
        assert find_packing_in_mask(mask, counted) is None
    assert find_packing_in_mask(mask, None) is None


IN_PIECES = r"expected whole numbers that rise along a row"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a number comes back": (dict(attention_mask=[1, 1, 2, 2, 1]), IN_PIECES),
    "a pad within a sequence": (dict(attention_mask=[1, 0, 1, 2, 2]), IN_PIECES),
    "a negative number": (dict(attention_mask=[-1, -1, 2, 2, 2]), IN_PIECES),
    "half": (dict(attention_mask=[1.5, 1.5, 2, 2, 2]), IN_PIECES),
    "a pad within positions": (
        dict(attention_mask=[1, 0, 1, 1, 1], position_ids=[0, 9, 1, 0, 1]),
        IN_PIECES,
    ),
    "a mask to be added": (dict(attention_mask=[0, 0, 0, -1e9, -1e9]), "values other than 0 and 1"),
    "one and a half": (dict(attention_mask=[0.5, 1, 1, 1, 1]), "values other than 0 and 1"),
    "positions for more tokens": (dict(position_ids=[0, 1, 2, 0, 1, 2]), "position_ids has shape"),
}


@pytest.mark.parametrize("kind", ["gka", "hybrid"])
@pytest.mark.parametrize("name", list(BAD))
def test_refuses(name: str, kind: str) -> None:
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        tiny_model(kind)(random_tokens(1, 5), **{key: torch.tensor([row]) for key, row in arguments.items()})


@pytest.mark.parametrize("kind", ["gka", "hybrid"])
def test_refuses_a_packed_batch_with_a_cache(kind: str) -> None:
    model, ids = tiny_model(kind), random_tokens(1, 5)
    packed, restarting = torch.tensor([[1, 1, 1, 2, 2]]), torch.tensor([[0, 1, 2, 0, 1]])
    for told in (
        dict(attention_mask=packed),
        dict(position_ids=restarting),
        dict(attention_mask=packed != 0, position_ids=restarting),
    ):
        with pytest.raises(ValueError, match="a cache has one state per row"):
            model(ids, past_key_values=new_cache(model.config), **told)
        with pytest.raises(ValueError, match="a cache has one state per row"):
            model.generate(ids, max_new_tokens=2, pad_token_id=PAD, **{"attention_mask": packed != 0, **told})
    with pytest.raises(ValueError, match="no masks by kind"):
        model(
            ids, position_ids=restarting, attention_mask=dict.fromkeys(model.config.layer_types), use_cache=False
        )


def test_on_a_gpu_the_device_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device whose values are not read; with GKA_CHECK_VALUES they are honoured there, too."""
    monkeypatch.setattr(checks, "NEVER_WAITING", ())
    monkeypatch.delenv("GKA_CHECK_VALUES", raising=False)
    model = tiny_model("hybrid")
    for way in ways().values():
        with pytest.raises(RuntimeError, match=r"values other than 0 and 1|do not rise"):
            model(tokens(), **way)
    with pytest.raises(RuntimeError, match="values other than 0 and 1"):
        tiny_layer()(random_inputs(2, 12, 36), numbers())
    monkeypatch.setenv("GKA_CHECK_VALUES", "1")
    assert model(tokens(), **ways()["numbers"]).past_key_values is None


def test_the_layer_alone_refuses_numbers() -> None:
    for mask in (numbers(), numbers().double(), torch.full((2, 12), -1)):
        with pytest.raises(ValueError, match=r"values other than 0 and 1.*cu_seqlens"):
            tiny_layer()(random_inputs(2, 12, 36), mask)


def test_in_place_of_attention_refuses_what_it_cannot_tell_apart() -> None:
    layer, x = InPlaceOfAttention(GatedKalmaNet(32, 4, layer_idx=0)), torch.randn(2, 12, 32)
    with pytest.raises(ValueError, match=r"values other than 0 and 1.*cu_seq_lens_q"):
        layer(x, attention_mask=numbers())
    for mask in (None, numbers() != 0):
        with pytest.raises(ValueError, match=r"do not rise.*cu_seq_lens_q"):
            layer(x, attention_mask=mask, position_ids=positions())
    with pytest.raises(ValueError, match="seq_idx is given without cu_seq_lens_q"):
        layer(x, seq_idx=numbers())
    told = dict(position_ids=torch.tensor([[0, 1, 2, 0, 1]]), seq_idx=torch.tensor([[0, 0, 0, 1, 1]]))
    packed = layer(x[:1, :5], cu_seq_lens_q=torch.tensor([0, 3, 5]), **told)[0]
    assert_near(packed[:, 3:], layer(x[:1, 3:5], position_ids=torch.tensor([[0, 1]]))[0], 1e-5)
