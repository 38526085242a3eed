"""The examples of multi-query associative recall are what the definition says (experiments/tasks/mqar.py)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.tasks.mqar import IGNORE, make_mqar, slot_probabilities
from gka.training.errors import UserError


@st.composite
def settings(draw: st.DrawFn) -> dict:
    num_pairs = draw(st.integers(1, 12))
    return {
        "num_pairs": num_pairs,
        "seq_len": 4 * num_pairs + 2 * draw(st.integers(0, 20)),
        "vocab_size": 2 * (num_pairs + 1) + draw(st.integers(0, 200)),
        "power_a": draw(st.sampled_from([0.01, 0.5, 1.0])),
        "random_non_queries": draw(st.booleans()),
        "seed": draw(st.integers(0, 10_000)),
        "split": draw(st.sampled_from(["train", "test"])),
    }


@given(settings(), st.integers(0, 20))
def test_shapes_and_types(setting: dict, examples: int) -> None:
    inputs, labels = make_mqar(examples, **setting)
    assert inputs.shape == labels.shape == (examples, setting["seq_len"])
    assert inputs.dtype == labels.dtype == torch.int64


@given(settings())
def test_every_key_stands_there_twice_and_its_query_asks_for_its_value(setting: dict) -> None:
    inputs, labels = make_mqar(8, **setting)
    context, half = 2 * setting["num_pairs"], setting["vocab_size"] // 2
    for row, label in zip(inputs.tolist(), labels.tolist(), strict=True):
        keys, values = row[0:context:2], row[1:context:2]
        assert len(set(keys)) == len(set(values)) == setting["num_pairs"]
        assert min(keys) >= 1 and max(keys) < half <= min(values) and max(values) < setting["vocab_size"]
        value_of = dict(zip(keys, values, strict=True))
        asked = [position for position, answer in enumerate(label) if answer != IGNORE]
        assert sorted(row[position] for position in asked) == sorted(keys)
        assert all(position >= context and position % 2 == 0 for position in asked)
        assert all(label[position] == value_of[row[position]] for position in asked)
        assert [token in value_of for token in row].count(True) == 2 * len(keys)
        if not setting["random_non_queries"]:
            fillers = set(row[context:]) - set(keys)
            assert fillers <= {0}


def test_the_published_example_is_reproduced_in_form() -> None:
    inputs, labels = make_mqar(1, seq_len=16, num_pairs=2, vocab_size=12, random_non_queries=False, seed=3)
    assert (inputs[0, :4] > 0).all()
    assert (inputs[0, 4:] > 0).sum() == 2 == (labels[0] != IGNORE).sum()


@pytest.mark.parametrize("power_a", [0.01, 0.5, 1.0])
def test_slots_of_the_first_pair_follow_the_power_law(power_a: float) -> None:
    slots, expected = _slots(power_a), slot_probabilities(64, 8, power_a)
    assert expected.sum().item() == pytest.approx(1.0)
    assert expected[3] / expected[0] == pytest.approx(4.0 ** (power_a - 1))
    assert _chi_square(slots[:, 0], expected) < _critical(len(expected) - 1)


def test_the_slot_test_tells_power_laws_apart() -> None:
    other = slot_probabilities(64, 8, 0.2)
    assert _chi_square(_slots(0.01)[:, 0], other) > _critical(len(other) - 1)


def test_slots_are_drawn_one_after_the_other_without_replacement() -> None:
    p = slot_probabilities(12, 2, 0.3)
    joint = p[:, None] * p[None, :] / (1 - p[:, None])
    joint.fill_diagonal_(0.0)
    _, labels = make_mqar(20_000, seq_len=12, num_pairs=2, vocab_size=64, power_a=0.3)
    slots = _slots_of(labels, *_pairs(12, 2, 64, 0.3))
    flat = slots[:, 0] * len(p) + slots[:, 1]
    possible = joint.flatten() > 0
    assert possible[flat].all()
    index = possible.cumsum(0) - 1
    assert _chi_square(index[flat], joint.flatten()[possible]) < _critical(int(possible.sum()) - 1)


def test_keys_and_values_are_uniform_in_every_order() -> None:
    inputs, _ = make_mqar(24_000, seq_len=8, num_pairs=2, vocab_size=10)
    for first, second, lowest, size in ((0, 2, 1, 4), (1, 3, 5, 5)):
        pair = (inputs[:, first] - lowest) * size + inputs[:, second] - lowest
        possible = torch.tensor([i for i in range(size * size) if i // size != i % size])
        index = torch.searchsorted(possible, pair)
        assert (possible[index] == pair).all()
        assert _chi_square(index, torch.full((len(possible),), 1 / len(possible))) < _critical(len(possible) - 1)


def test_fillers_are_uniform_over_the_tokens_that_are_no_keys() -> None:
    inputs, labels = make_mqar(20_000, seq_len=8, num_pairs=1, vocab_size=8)
    filler = (labels == IGNORE) & (torch.arange(8) >= 2)
    for key in (1, 2, 3):
        tokens = inputs[inputs[:, 0] == key][filler[inputs[:, 0] == key]]
        left = torch.tensor([token for token in range(8) if token != key])
        index = torch.searchsorted(left, tokens)
        assert (left[index] == tokens).all()
        assert _chi_square(index, torch.full((7,), 1 / 7)) < _critical(6)


def test_the_same_arguments_give_the_same_examples() -> None:
    first, second = make_mqar(50, seed=7), make_mqar(50, seed=7)
    assert torch.equal(first.inputs, second.inputs) and torch.equal(first.labels, second.labels)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_seeds_and_splits_have_streams_of_their_own(seed: int, other: int) -> None:
    train = make_mqar(4, seed=seed)
    assert not torch.equal(train.inputs, make_mqar(4, seed=other, split="test").inputs)
    assert seed == other or not torch.equal(train.inputs, make_mqar(4, seed=other).inputs)


def test_no_test_sequence_is_in_the_training_set() -> None:
    train = make_mqar(5_000, seq_len=16, num_pairs=2, split="train")
    test = make_mqar(1_000, seq_len=16, num_pairs=2, split="test")
    assert not {tuple(row) for row in train.inputs.tolist()} & {tuple(row) for row in test.inputs.tolist()}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seq_len": 63}, "even"),
        ({"seq_len": 30, "num_pairs": 8}, "at least 32"),
        ({"num_pairs": 0}, "num_pairs"),
        ({"vocab_size": 17, "num_pairs": 8}, "at least 18"),
        ({"power_a": 0.0}, "power_a"),
        ({"power_a": math.nan}, "power_a"),
    ],
)
def test_settings_that_no_sequence_fits_are_refused(setting: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_mqar(1, **setting)


def _pairs(seq_len: int, num_pairs: int, vocab_size: int, power_a: float) -> tuple[torch.Tensor, int]:
    inputs, _ = make_mqar(20_000, seq_len=seq_len, num_pairs=num_pairs, vocab_size=vocab_size, power_a=power_a)
    return inputs[:, 1 : 2 * num_pairs : 2], 2 * num_pairs


def _slots_of(labels: torch.Tensor, values: torch.Tensor, context: int) -> torch.Tensor:
    """Slot of every pair's query, [N, P], in the order of the pairs."""
    positions = (labels[:, None, :] == values[:, :, None]).int().argmax(2)
    return (positions - context) // 2


def _slots(power_a: float) -> torch.Tensor:
    _, labels = make_mqar(20_000, seq_len=64, num_pairs=8, power_a=power_a)
    return _slots_of(labels, *_pairs(64, 8, 8192, power_a))


def _chi_square(drawn: torch.Tensor, expected: torch.Tensor) -> float:
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    wanted = expected.double() * len(drawn)
    return ((counts - wanted) ** 2 / wanted).sum().item()


def _critical(freedom: int) -> float:
    """What chi square exceeds in one of 10,000 cases (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 3.719 * math.sqrt(spread)) ** 3
