"""Packed batches equal the single sequences, in every way of telling where they start; gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_helpers import assert_near, new_cache, parameter_gradients, random_tokens, tiny_model
from torch import Tensor

from gka.hf.packing import find_packing

BOUND = 1e-6
LENGTHS = (6, 1, 11, 3, 1)
KINDS = ("gka", "gla", "hybrid", "hybrid, sliding", "hybrid, all three")


def edges() -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).int()


def positions() -> Tensor:
    return torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)


def numbers() -> Tensor:
    return torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).unsqueeze(0).int()


def ways() -> dict[str, dict[str, Any]]:
    flash = dict(cu_seq_lens_q=edges(), cu_seq_lens_k=edges(), max_length_q=11, max_length_k=11)
    return {
        "position_ids": dict(position_ids=positions()),
        "cu_seq_lens": dict(cu_seq_lens_q=edges()),
        "seq_idx": dict(seq_idx=numbers()),
        "all of a collator": dict(**flash, seq_idx=numbers(), position_ids=positions()),
        "flash keywords alone": flash,
    }


def single_logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    return torch.cat([model(row, use_cache=False).logits for row in tokens.split(LENGTHS, dim=1)], dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", list(ways()))
@torch.no_grad()
def test_packed_equals_single(kind: str, way: str) -> None:
    model, tokens = tiny_model(kind), random_tokens(1, sum(LENGTHS))
    out = model(tokens, **ways()[way])
    assert_near(out.logits, single_logits(model, tokens), BOUND)
    assert out.past_key_values is None
    model.set_attn_implementation("eager")
    assert_near(model(tokens, **ways()[way]).logits, single_logits(model, tokens), BOUND)


@pytest.mark.parametrize("way", list(ways()))
@torch.no_grad()
def test_rotary_positions_restart(way: str) -> None:
    model, seen = tiny_model("hybrid"), []
    model.model.rotary_emb.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    model(random_tokens(1, sum(LENGTHS)), **ways()[way])
    assert torch.equal(seen[0], positions())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["position_ids", "seq_idx"])
@torch.no_grad()
def test_several_packed_rows(kind: str, way: str) -> None:
    model, tokens = tiny_model(kind), random_tokens(2, 10)
    rows = [(4, 6), (1, 2, 7)]
    told = {
        "position_ids": torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows]),
        "seq_idx": torch.stack([torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in rows]),
    }
    logits = model(tokens, **{way: told[way]}).logits
    for n, row in enumerate(rows):
        single = torch.cat([model(part).logits for part in tokens[n : n + 1].split(row, dim=1)], dim=1)
        assert_near(logits[n : n + 1], single, BOUND, f"row {n}")


@pytest.mark.parametrize("kind", ["gka", "hybrid", "hybrid, sliding"])
@pytest.mark.parametrize("way", list(ways()))
def test_gradients(kind: str, way: str) -> None:
    model, tokens = tiny_model(kind), random_tokens(1, sum(LENGTHS))
    grads = []
    for packed in (True, False):
        model.zero_grad()
        logits = model(tokens, use_cache=False, **ways()[way]).logits if packed else single_logits(model, tokens)
        torch.nn.functional.cross_entropy(logits[0], tokens[0]).backward()
        grads.append(parameter_gradients(model))
    for name in grads[0]:
        assert_near(grads[0][name], grads[1][name], 1e-5, name)


@torch.no_grad()
def test_positions_that_do_not_restart_are_one_sequence() -> None:
    model, tokens = tiny_model("hybrid"), random_tokens(2, 9)
    plain = model(tokens, use_cache=False).logits
    assert_near(model(tokens, position_ids=torch.arange(9).unsqueeze(0), use_cache=False).logits, plain, BOUND)
    shifted = torch.arange(9).unsqueeze(0) + 5  # the rotary embedding is relative
    assert_near(model(tokens, position_ids=shifted, use_cache=False).logits, plain, BOUND)


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_the_three_ways_agree(lengths: list[int]) -> None:
    T, starts = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    position_ids = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).unsqueeze(0)
    found = [
        find_packing((1, T), starts, None, None),
        find_packing((1, T), None, seq_idx, None),
        find_packing((1, T), None, None, position_ids),
    ]
    for packing in found[(len(lengths) == 1 and 3) or 0 :]:
        assert packing is not None
        assert torch.equal(packing.cu_seqlens, starts) and torch.equal(packing.positions, position_ids)
    if len(lengths) == 1:
        assert found[1] is None and found[2] is None
        assert found[0] is not None and torch.equal(found[0].positions, position_ids)


def bad_calls() -> dict[str, tuple[dict[str, Any], str]]:
    mask = torch.ones(1, sum(LENGTHS))
    cache = new_cache(tiny_model().config)
    return {
        "lengths and mask": (dict(cu_seq_lens_q=edges(), attention_mask=mask), "leave padding out"),
        "numbers and mask": (dict(seq_idx=numbers(), attention_mask=mask), "leave padding out"),
        "lengths and cache": (dict(cu_seq_lens_q=edges(), past_key_values=cache), "as rows, padded"),
        "lengths of the wrong shape": (dict(cu_seq_lens_q=edges().view(1, -1)), r"expected \[N \+ 1\]"),
        "lengths of nothing": (dict(cu_seq_lens_q=edges()[:1]), r"expected \[N \+ 1\]"),
        "lengths that end early": (dict(cu_seq_lens_q=edges()[:-1]), "cu_seqlens is"),
        "numbers of the wrong shape": (dict(seq_idx=numbers()[:, 1:]), "seq_idx has shape"),
        "not causal": (dict(is_causal=False), "sees the past only"),
    }


@pytest.mark.parametrize("name", list(bad_calls()))
def test_refuses(name: str) -> None:
    arguments, message = bad_calls()[name]
    with pytest.raises(ValueError, match=message):
        tiny_model()(random_tokens(1, sum(LENGTHS)), **arguments)


def test_refuses_lengths_with_several_rows() -> None:
    with pytest.raises(ValueError, match="expected 1: concatenate the sequences"):
        tiny_model()(random_tokens(2, sum(LENGTHS)), cu_seq_lens_q=edges())


def test_refuses_several_packed_rows_with_flash_attention() -> None:
    model, row = tiny_model("hybrid"), positions()
    model.config._attn_implementation = "flash_attention_2"  # not installed: this is refused before it is called
    with pytest.raises(ValueError, match="flash_attention_2 takes 1"):
        model(random_tokens(2, sum(LENGTHS)), position_ids=row.expand(2, -1), use_cache=False)


def test_refuses_unknown_keywords() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'cu_seqlens'"):
        tiny_model()(random_tokens(1, sum(LENGTHS)), cu_seqlens=edges())
