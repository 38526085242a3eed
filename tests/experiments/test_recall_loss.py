"""Loss by position and by the distance of what can be recalled is what it says."""

from __future__ import annotations

import copy
import json
import math
import time
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from experiments.tasks.recall_loss import (
    RecallLoss,
    bigram_distances,
    common_bigrams,
    context_windows,
    recall_loss,
    sum_nats,
    token_nats,
)
from gka.cli.evaluate import document_nats
from gka.hf import GKAConfig, GKAForCausalLM

VOCAB = 24
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
few_tokens = st.lists(st.integers(0, 3), max_size=60)


def naive_distances(row: list[int]) -> list[int]:
    last: dict[tuple[int, int], int] = {}
    found = [0] * len(row)
    for t in range(1, len(row)):
        bigram = (row[t - 1], row[t])
        found[t] = t - last[bigram] if bigram in last else 0
        last[bigram] = t
    return found


def draw_windows(*lengths: int, seed: int = 0, vocab: int = VOCAB) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab, length) for length in lengths]


# Distances


@given(few_tokens)
def test_distances_are_those_of_a_walk_with_a_dictionary(row: list[int]) -> None:
    found = bigram_distances(np.array(row, np.int64))
    assert found.dtype == np.int64
    assert found.tolist() == naive_distances(row)


@given(st.integers(1, 4), st.integers(0, 30), st.integers(0, 1000), st.sampled_from(["uint16", "uint32", "torch"]))
def test_every_row_is_a_context_of_its_own(rows: int, length: int, seed: int, kind: str) -> None:
    ids = np.random.default_rng(seed).integers(0, 3, (rows, length))
    tokens = torch.from_numpy(ids) if kind == "torch" else ids.astype(kind)
    found = bigram_distances(tokens)
    assert found.shape == (rows, length)
    assert found.tolist() == [naive_distances(row) for row in ids.tolist()]


def test_great_ids_are_not_mixed_up() -> None:
    top = 2**32 - 1
    assert bigram_distances(np.array([top, 0, 0, top, 0, 1, 0, top])).tolist() == [0, 0, 0, 0, 3, 0, 0, 4]
    for wrong in (np.array([-1, 0]), np.array([2**32, 0]), np.array([0.0, 1.0]), np.zeros((1, 1, 1), np.int64)):
        with pytest.raises(ValueError):
            bigram_distances(wrong)


def test_a_long_context_takes_well_below_a_second() -> None:
    tokens = draw_windows(2**17, vocab=500)[0]
    begin = time.perf_counter()
    found = bigram_distances(tokens)
    assert time.perf_counter() - begin < 0.5
    assert found.tolist() == naive_distances(tokens.tolist())


@given(few_tokens, st.integers(0, 6))
def test_common_bigrams_are_those_that_stand_there_more_often(row: list[int], more_than: int) -> None:
    counts = Counter(pairwise(row))
    expected = sorted(bigram for bigram, count in counts.items() if count > more_than)
    found = common_bigrams(np.array(row, np.uint16), more_than)
    assert [(code >> 32, code & (2**32 - 1)) for code in found.tolist()] == expected


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="more_than"):
        common_bigrams(np.array([1, 2]), -1)


# Sums


def bins_of(loss: RecallLoss, name: str) -> dict[tuple[int, int], tuple[int, float]]:
    return {(part.first, part.last): (part.tokens, part.nats) for part in getattr(loss, name) if part.tokens}


@given(st.lists(st.integers(2, 70), min_size=1, max_size=5), st.integers(0, 1000), st.integers(0, 4))
def test_the_bins_hold_every_predicted_token_once(lengths: list[int], seed: int, more_than: int) -> None:
    windows = draw_windows(*lengths, seed=seed, vocab=4)
    random = np.random.default_rng(seed)
    nats = [random.random(len(window) - 1, np.float32) for window in windows]
    common = common_bigrams(windows[0], more_than)
    loss = sum_nats(windows, nats, num_bytes=10, common=common)
    assert loss.tokens == sum(lengths) - len(lengths)
    assert loss.nats == pytest.approx(sum(float(row.sum()) for row in nats), rel=1e-5)
    assert sum(part.tokens for part in loss.positions) == loss.tokens == loss.recall_tokens + loss.other_tokens
    assert math.fsum(part.nats for part in loss.positions) == pytest.approx(loss.nats)
    assert loss.recall_nats + loss.other_nats == pytest.approx(loss.nats)

    # the same by hand, token by token
    left_out = {(int(code) >> 32, int(code) & (2**32 - 1)) for code in common}
    positions, recall, other = Counter(), Counter(), 0
    for window in windows:
        row = window.tolist()
        for t, distance in enumerate(naive_distances(row)):
            if t:
                positions[max(t - 1, 1).bit_length() - 1] += 1
                if distance and (row[t - 1], row[t]) not in left_out:
                    recall[distance.bit_length() - 1] += 1
                else:
                    other += 1
    assert {b: part.tokens for b, part in enumerate(loss.positions) if part.tokens} == positions
    assert {b: part.tokens for b, part in enumerate(loss.recall) if part.tokens} == recall
    assert loss.other_tokens == other


def test_bins_double() -> None:
    window = np.concatenate([[7, 8], np.arange(100, 162), [7, 8]])  # 7 8 comes again after 64 tokens
    loss = sum_nats([window], [np.ones(65, np.float32)], num_bytes=1)
    assert [(part.first, part.last) for part in loss.positions] == [
        (0, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 127),
    ]  # fmt: skip
    assert [part.tokens for part in loss.positions] == [2, 2, 4, 8, 16, 32, 1]
    assert [(part.first, part.last) for part in loss.recall][:3] == [(1, 1), (2, 3), (4, 7)]
    assert bins_of(loss, "recall") == {(64, 127): (1, 1.0)}


def test_bigrams_that_are_common_are_no_recall() -> None:
    window, nats = np.array([1, 2, 5, 1, 2, 6, 5, 1]), [np.arange(7, dtype=np.float32)]
    every = sum_nats([window], nats, num_bytes=1)
    assert bins_of(every, "recall") == {(2, 3): (1, 3.0), (4, 7): (1, 6.0)}
    common = common_bigrams(np.array([1, 2, 1, 2, 1, 2, 5, 1]), more_than=2)
    rare = sum_nats([window], nats, num_bytes=1, common=common)
    assert bins_of(rare, "recall") == {(4, 7): (1, 6.0)}
    assert (rare.other_tokens, rare.other_nats) == (6, 15.0)
    assert (rare.nats, rare.tokens, rare.positions) == (every.nats, every.tokens, every.positions)


def test_means_are_sums_over_counts_and_go_into_json() -> None:
    window = np.array([1, 2, 5, 1, 2])
    loss = sum_nats([window], [np.array([1, 2, 3, 6], np.float32)], num_bytes=8)
    assert (loss.loss, loss.recall_loss, loss.other_loss) == (3.0, 6.0, 2.0)
    assert loss.bits_per_byte == pytest.approx(12 / math.log(2) / 8)
    values = json.loads(json.dumps(loss.as_dict(), allow_nan=False))
    assert values["positions"][1] == {"first": 2, "last": 3, "tokens": 2, "nats": 9.0, "loss": 4.5}
    assert values["recall"][0] == {"first": 1, "last": 1, "tokens": 0, "nats": 0.0, "loss": None}
    assert (values["loss"], values["recall_loss"], values["other_loss"]) == (3.0, 6.0, 2.0)
    nothing = sum_nats([window[:2]], [np.ones(1, np.float32)], num_bytes=1)
    assert nothing.recall == () and math.isnan(nothing.recall_loss)
    assert json.loads(json.dumps(nothing.as_dict(), allow_nan=False))["recall_loss"] is None


def test_what_does_not_fit_is_refused() -> None:
    window, nats = np.array([1, 2, 3]), np.ones(2, np.float32)
    for windows, rows, num_bytes in (
        ([], [], 1),
        ([window], [nats], 0),
        ([window], [nats[:1]], 1),
        ([window], [], 1),
    ):
        with pytest.raises(ValueError):
            sum_nats(windows, rows, num_bytes=num_bytes)
    with pytest.raises(ValueError, match="window 1 has 1 tokens"):
        token_nats(Copies(), [window, window[:1]], batch_size=2)
    with pytest.raises(ValueError, match="context"):
        context_windows([window], 0, 0)


# Models


class Known(nn.Module):
    """A model that gives the next token, wherever p = 0, 1, 2, ... stands, the probability exp(-nats(p))."""

    device = torch.device("cpu")

    def __init__(self, targets: Tensor, nats: Tensor) -> None:
        super().__init__()
        self.targets, self.nats = targets, nats

    @property
    def base_model(self) -> nn.Module:
        return self

    def get_output_embeddings(self) -> nn.Module:
        return nn.Identity()

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        logs = torch.log((1 - torch.exp(-self.nats)) / (VOCAB - 1))[:, None].repeat(1, VOCAB)
        logs = logs.scatter(1, self.targets[:, None], -self.nats[:, None])
        return SimpleNamespace(last_hidden_state=logs[None, : input_ids.shape[1]].expand(len(input_ids), -1, -1))


class Copies(Known):
    """A model that expects the token which followed the last time that the token it has just read stood there."""

    def __init__(self) -> None:
        super().__init__(torch.empty(0), torch.empty(0))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        logits = torch.zeros(*input_ids.shape, VOCAB)
        for row, ids in enumerate(input_ids.tolist()):
            follows: dict[int, int] = {}
            for t, token in enumerate(ids):
                if token in follows:
                    logits[row, t, follows[token]] = 20.0
                if t + 1 < len(ids):
                    follows[token] = ids[t + 1]
        return SimpleNamespace(last_hidden_state=logits)


def test_a_loss_that_is_known_per_position_stands_in_its_bin() -> None:
    window = draw_windows(101)[0]
    nats = 0.1 + torch.arange(100) / 40
    loss = recall_loss(Known(torch.from_numpy(window[1:]), nats), [window], num_bytes=50, batch_size=1)
    for part in loss.positions:
        here = nats[part.first : part.last + 1]
        assert part.tokens == len(here)
        assert part.nats == pytest.approx(here.sum().item(), rel=1e-5)
    by_distance: Counter[int] = Counter()
    for t, distance in enumerate(naive_distances(window.tolist())):
        if t and distance:
            by_distance[distance.bit_length() - 1] += nats[t - 1].item()
    assert by_distance and {b: part.nats for b, part in enumerate(loss.recall) if part.tokens} == pytest.approx(
        dict(by_distance), rel=1e-5
    )
    assert loss.bits_per_byte == pytest.approx(nats.sum().item() / math.log(2) / 50, rel=1e-5)


def test_a_model_that_copies_is_good_at_recall_tokens_alone() -> None:
    """Each token is followed by one other in a window, but which one it is differs from window to window."""
    random = np.random.default_rng(5)
    windows = [np.tile(random.permutation(VOCAB)[:size], 4) for size in (3, 7, 12, 20)]
    loss = recall_loss(Copies(), windows, num_bytes=1, batch_size=3)
    assert loss.recall_loss < 1e-6
    # what is new is a token after one that is new, too: all are equally likely there
    assert loss.other_loss == pytest.approx(math.log(VOCAB))
    assert loss.other_tokens == 3 + 7 + 12 + 20
    assert {(part.first, part.last): part.tokens for part in loss.recall if part.tokens} == {
        (2, 3): 3 * 4 - 1 - 3, (4, 7): 7 * 4 - 1 - 7, (8, 15): 12 * 4 - 1 - 12, (16, 31): 20 * 4 - 1 - 20,
    }  # fmt: skip


@pytest.fixture(scope="module", params=["gka", "hybrid", "qwen3"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    if request.param == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()
    kinds = ["linear_attention", "full_attention" if request.param == "hybrid" else "linear_attention"]
    return GKAForCausalLM(GKAConfig(**SIZES, layer_types=kinds, solver_steps=[12], initializer_range=0.02)).eval()


def test_totals_are_those_of_the_evaluation(model: Any) -> None:
    documents = draw_windows(40, 1, 23, 40)
    windows = context_windows(documents, 1, 64)
    loss = recall_loss(model, windows, num_bytes=77, batch_size=3, slice_tokens=7)
    expected = document_nats(model, documents, 1, window=16, batch_size=3)
    assert loss.nats == pytest.approx(sum(expected), rel=1e-5)
    assert (loss.tokens, loss.bytes) == (104, 77)
    for row, total in zip(token_nats(model, windows, batch_size=2), expected, strict=True):
        assert float(row.sum()) == pytest.approx(total, rel=1e-5)


def test_nats_are_those_of_the_models_own_logits(model: Any) -> None:
    window = draw_windows(30)[0]
    (found,) = token_nats(model, [window], batch_size=1)
    tokens = torch.from_numpy(window)
    with torch.no_grad():
        logits = model(tokens[None, :-1]).logits[0]
    np.testing.assert_allclose(found, F.cross_entropy(logits, tokens[1:], reduction="none").numpy(), rtol=1e-5)
    assert found.dtype == np.float32


def test_the_logarithm_of_a_bfloat16_model_is_taken_in_float32(model: Any) -> None:
    window, model = draw_windows(30)[0], copy.deepcopy(model).bfloat16()
    (found,) = token_nats(model, [window], batch_size=1)
    tokens = torch.from_numpy(window)
    with torch.no_grad():
        logits = model(tokens[None, :-1]).logits[0]
    assert logits.dtype == torch.bfloat16
    right = F.cross_entropy(logits.float(), tokens[1:], reduction="none").numpy()
    np.testing.assert_allclose(found, right, rtol=1e-5)


@pytest.mark.parametrize("slice_tokens", [1, 5, 64, 4096])
@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_neither_slices_nor_batches_change_the_numbers(model: Any, slice_tokens: int, batch_size: int) -> None:
    windows = draw_windows(33, 2, 20, 33, 9)
    whole = [token_nats(model, [window], batch_size=1, slice_tokens=10**6)[0] for window in windows]
    found = token_nats(model, windows, batch_size=batch_size, slice_tokens=slice_tokens)
    for row, right in zip(found, whole, strict=True):
        np.testing.assert_allclose(row, right, rtol=2e-5)


def test_no_more_logits_are_in_memory_than_the_slice_has(model: Any) -> None:
    sizes: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, logits: sizes.append(logits[..., 0].numel()))
    token_nats(model, draw_windows(30, 30, 10), batch_size=2, slice_tokens=16)
    hook.remove()
    assert sizes == [16, 16, 16, 10, 9]


def test_autocast_computes_in_bfloat16_and_stays_near(model: Any) -> None:
    dtypes: list[torch.dtype] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, logits: dtypes.append(logits.dtype))
    windows = draw_windows(40, 30)
    exact, rough = (token_nats(model, windows, batch_size=2, autocast=autocast) for autocast in (False, True))
    hook.remove()
    assert dtypes == [torch.float32, torch.bfloat16]
    for row, right in zip(rough, exact, strict=True):
        assert row.dtype == np.float32
        assert 0 < np.abs(row - right).max() < 0.05


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 50))
def test_windows_predict_every_token_once_and_in_order(lengths: list[int], context: int) -> None:
    documents = draw_windows(*lengths)
    windows = context_windows(documents, 99, context)
    predicted = np.concatenate([np.empty(0, np.int64), *(window[1:] for window in windows)])
    assert predicted.tolist() == np.concatenate(documents).tolist()
    assert all(2 <= len(window) <= context + 1 for window in windows)
    starts = sum(int(window[0]) == 99 for window in windows)
    assert starts == sum(length > 0 for length in lengths)
    assert all(window[0] in (99, before[-1]) for before, window in pairwise(windows))


def test_long_documents_are_read_window_by_window_without_memory(model: Any) -> None:
    document = draw_windows(50)[0]
    windows = context_windows([document], 1, 20)
    apart = [document_nats(model, [window[1:]], int(window[0]), window=64, batch_size=1)[0] for window in windows]
    assert recall_loss(model, windows, num_bytes=1, batch_size=3).nats == pytest.approx(sum(apart), rel=1e-5)
    whole = document_nats(model, [document], 1, window=64, batch_size=1)[0]
    assert abs(sum(apart) / whole - 1) > 1e-5
