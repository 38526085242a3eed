"""Padded batches equal the single sequences: on every side, in cached calls, in generate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_helpers import PAD, assert_near, new_cache, parameter_gradients, random_tokens, tiny_model
from torch import Tensor
from transformers import DynamicCache

from gka import GKAForCausalLM

BOUND = 1e-6
LENGTHS = (5, 12, 1, 9)
SIDES = ("left", "right", "middle", "scattered")
KINDS = ("gka", "gla", "gka without v convolution", "hybrid", "hybrid, attention first")


def prompts() -> list[Tensor]:
    return list(random_tokens(sum(LENGTHS)).split(LENGTHS))


def pad(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch, and its mask."""
    longest = max(map(len, rows)) + (side == "scattered") * 3
    ids, mask = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.long)
    generator = torch.Generator().manual_seed(3)
    for n, row in enumerate(rows):
        T = len(row)
        places = {
            "left": torch.arange(longest - T, longest),
            "right": torch.arange(T),
            "middle": torch.cat([torch.arange(T // 2), torch.arange(longest - T + T // 2, longest)]),
            "scattered": torch.randperm(longest, generator=generator)[:T].sort().values,
        }[side]
        ids[n, places], mask[n, places] = row, 1
    return ids, mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", SIDES)
@torch.no_grad()
def test_padded_equals_single(kind: str, side: str) -> None:
    model, rows = tiny_model(kind), prompts()
    ids, mask = pad(rows, side)
    for use_cache in (False, True):
        logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
        assert logits.isfinite().all()
        for n, row in enumerate(rows):
            single = model(row.unsqueeze(0), use_cache=False).logits[0]
            assert_near(logits[n][mask[n] == 1], single, BOUND, f"row {n}")


@torch.no_grad()
def test_left_padding_with_a_sliding_window() -> None:
    model, rows = tiny_model("hybrid, sliding"), prompts()
    ids, mask = pad(rows, "left")
    logits = model(ids, attention_mask=mask).logits
    for n, row in enumerate(rows):
        assert_near(logits[n][mask[n] == 1], model(row.unsqueeze(0)).logits[0], BOUND, f"row {n}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", SIDES)
@torch.no_grad()
def test_decoding_after_a_padded_prompt(kind: str, side: str) -> None:
    model, rows = tiny_model(kind), prompts()
    ids, mask = pad(rows, side)
    going_on = random_tokens(len(rows), 4, seed=1)
    cache = new_cache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    steps = []
    for t in range(going_on.shape[1]):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        steps.append(model(going_on[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits)
    for n, row in enumerate(rows):
        single = model(torch.cat([row, going_on[n]]).unsqueeze(0)).logits[0, len(row) :]
        assert_near(torch.cat(steps, dim=1)[n], single, BOUND, f"row {n}")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padded_parts_of_a_prompt(kind: str) -> None:
    """A scattered batch cut into parts of several tokens and of one: pads stand in cached calls too."""
    model, rows = tiny_model(kind), prompts()
    ids, mask = pad(rows, "scattered")
    cache, parts, done = new_cache(model.config), [], 0
    for part in ids.split([4, 1, 6, 1, 3], dim=1):
        done += part.shape[1]
        parts.append(model(part, attention_mask=mask[:, :done], past_key_values=cache).logits)
    logits = torch.cat(parts, dim=1)
    for n, row in enumerate(rows):
        assert_near(logits[n][mask[n] == 1], model(row.unsqueeze(0)).logits[0], BOUND, f"row {n}")


@pytest.mark.parametrize("kind", [*KINDS, "hybrid, sliding"])
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_generate_from_left_padded_prompts(kind: str, use_cache: bool) -> None:
    model, rows = tiny_model(kind), prompts()
    ids, mask = pad(rows, "left")
    options = dict(max_new_tokens=7, do_sample=False, use_cache=use_cache)
    together = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    for n, row in enumerate(rows):
        assert torch.equal(together[n], model.generate(row.unsqueeze(0), **options)[0, len(row) :]), f"row {n}"


@torch.no_grad()
def test_generate_in_chunks_from_left_padded_prompts() -> None:
    model, rows = tiny_model("hybrid"), prompts()
    ids, mask = pad(rows, "left")
    options = dict(attention_mask=mask, max_new_tokens=7, do_sample=False)
    assert torch.equal(model.generate(ids, prefill_chunk_size=5, **options), model.generate(ids, **options))


def test_gradients_of_a_padded_batch() -> None:
    model, rows = tiny_model("hybrid"), prompts()
    ids, mask = pad(rows, "scattered")
    labels = ids.masked_fill(mask == 0, -100)
    grads = []
    for padded in (True, False):
        model.zero_grad()
        if padded:
            logits = model(ids, attention_mask=mask, use_cache=False).logits[mask == 1]
        else:
            logits = torch.cat([model(row.unsqueeze(0), use_cache=False).logits[0] for row in rows])
        torch.nn.functional.cross_entropy(logits, labels[mask == 1]).backward()
        grads.append(parameter_gradients(model))
    for name in grads[0]:
        assert_near(grads[0][name], grads[1][name], 1e-5, name)


@torch.no_grad()
def test_classifier_of_padded_rows() -> None:
    from gka import GKAForSequenceClassification

    torch.manual_seed(0)
    config = tiny_model("hybrid").config
    config.num_labels = 3
    model, rows = GKAForSequenceClassification(config).double().eval(), prompts()
    for side in ("left", "right"):
        ids, mask = pad(rows, side)
        out = model(ids, attention_mask=mask, labels=torch.tensor([0, 1, 2, 0]))
        single = torch.cat([model(row.unsqueeze(0)).logits for row in rows])
        assert out.loss.isfinite() and out.logits.shape == (4, 3)
        assert_near(out.logits, single, BOUND)


@pytest.mark.parametrize("shape", [(4, 3), (4, 1, 12, 12)])
def test_refuses_a_mask_that_does_not_fit(shape: tuple[int, ...]) -> None:
    ids, _ = pad(prompts(), "left")
    with pytest.raises(ValueError, match="attention_mask has shape"):
        tiny_model()(
            ids, attention_mask=torch.ones(shape), past_key_values=DynamicCache(config=tiny_model().config)
        )


def test_a_new_pad_token(tmp_path: Path) -> None:
    """A token behind the vocabulary: an error that says what to do, and doing it works."""
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "old")
    new = model.config.vocab_size
    with pytest.raises(ValueError, match=r"pad_token_id is 61; .*resize_token_embeddings first"):
        GKAForCausalLM.from_pretrained(tmp_path / "old", pad_token_id=new)
    model.resize_token_embeddings(new + 1)
    model.config.pad_token_id = new
    model.save_pretrained(tmp_path / "new")
    loaded = GKAForCausalLM.from_pretrained(tmp_path / "new")
    tokens = torch.tensor([[new, new, 3, 4], [5, 6, 7, 8]])
    padded = loaded(tokens, attention_mask=(tokens != new).long()).logits
    assert_near(padded[:1, 2:], loaded(tokens[:1, 2:]).logits, 1e-5)
