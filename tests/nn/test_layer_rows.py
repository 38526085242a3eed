"""The layer on padded, packed and cached rows equals the layer on each sequence alone, gradients included."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import assert_close
from hypothesis import given
from hypothesis import strategies as st
from model_helpers import assert_near, cache_tensors, new_cache, random_inputs, tiny_config, tiny_layer
from torch import Tensor

VARIANTS: dict[str, dict[str, Any]] = {
    "gka": {},
    "gla": {"mixer": "gla"},
    "no v convolution": {"use_v_conv": False},
    "no gates": {"use_beta_gate": False, "use_forget_gate": False, "use_alpha_connection": False},
    "no groups, wide convolution": {"num_key_value_heads": 4, "conv_size": 6},
}
BOUND = 1e-10


def masks(lengths: int) -> st.SearchStrategy[list[list[bool]]]:
    """Two rows of real tokens and pads in any order."""
    return st.lists(st.lists(st.booleans(), min_size=lengths, max_size=lengths), min_size=2, max_size=2)


def alone(layer: torch.nn.Module, rows: list[Tensor], config: Any) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Every row [T_n, hidden] on its own: outputs and what the cache holds afterwards."""
    outputs, held = [], []
    for row in rows:
        cache = new_cache(config)
        outputs.append(layer(row.unsqueeze(0), past_key_values=cache)[0])
        held.append(cache_tensors(cache))
    return outputs, held


@pytest.mark.parametrize("variant", list(VARIANTS))
@given(rows=masks(9))
def test_pads_anywhere(variant: str, rows: list[list[bool]]) -> None:
    layer, config = tiny_layer(**VARIANTS[variant]), tiny_config(**VARIANTS[variant])
    x, mask = random_inputs(2, 9, 36), torch.tensor(rows)
    cache = new_cache(config)
    noisy = torch.where(mask.unsqueeze(2), x, torch.nan)  # nothing at a pad may come through
    out = layer(noisy, mask, cache)
    assert out[~mask].eq(0.0).all()
    outputs, held = alone(layer, [row[real] for row, real in zip(x, mask, strict=True)], config)
    for n in range(2):
        assert_near(out[n][mask[n]], outputs[n], BOUND)
        for name, tensor in cache_tensors(cache).items():
            expected = held[n].get(name, torch.zeros_like(tensor[:1]))
            assert_near(tensor[n : n + 1], expected, BOUND, name)


@given(
    first=masks(5),
    second=masks(4),
    third=masks(1),
    mask_dtype=st.sampled_from([torch.bool, torch.long, torch.float]),
)
def test_pads_anywhere_in_calls_that_go_on(
    first: list[list[bool]], second: list[list[bool]], third: list[list[bool]], mask_dtype: torch.dtype
) -> None:
    layer, config = tiny_layer(), tiny_config()
    x, cache = random_inputs(2, 10, 36), new_cache(config)
    parts = [torch.tensor(rows) for rows in (first, second, third)]
    mask, done, outs = torch.cat(parts, dim=1), 0, []
    for part in parts:
        outs.append(layer(x[:, done : done + part.shape[1]], part.to(mask_dtype), cache))
        done += part.shape[1]
    out = torch.cat(outs, dim=1)
    outputs, held = alone(layer, [row[real] for row, real in zip(x, mask, strict=True)], config)
    for n in range(2):
        assert_near(out[n][mask[n]], outputs[n], BOUND)
        for name, tensor in cache_tensors(cache).items():
            expected = held[n].get(name, torch.zeros_like(tensor[:1]))
            assert_near(tensor[n : n + 1], expected, BOUND, name)


@pytest.mark.parametrize("variant", list(VARIANTS))
@given(cuts=st.lists(st.integers(1, 12), max_size=4, unique=True))
def test_calls_that_go_on_equal_one_call(variant: str, cuts: list[int]) -> None:
    layer, config = tiny_layer(**VARIANTS[variant]), tiny_config(**VARIANTS[variant])
    x, cache = random_inputs(2, 13, 36), new_cache(config)
    edges = [0, *sorted(cuts), 13]
    parts = [layer(x[:, a:b], past_key_values=cache) for a, b in itertools.pairwise(edges)]
    assert_near(torch.cat(parts, dim=1), layer(x), BOUND)


@pytest.mark.parametrize("variant", list(VARIANTS))
@given(lengths=st.lists(st.integers(0, 8), min_size=1, max_size=5).filter(any))
def test_packed_equals_alone(variant: str, lengths: list[int]) -> None:
    layer, config = tiny_layer(**VARIANTS[variant]), tiny_config(**VARIANTS[variant])
    x, edges = random_inputs(1, sum(lengths), 36), torch.tensor([0, *lengths]).cumsum(0)
    rows = [row for row in x[0].split(lengths) if len(row)]
    assert_near(layer(x, cu_seqlens=edges)[0], torch.cat(alone(layer, rows, config)[0]), BOUND)
    assert_near(layer(x, cu_seqlens=edges.int()), layer(x, cu_seqlens=edges), BOUND)


def gradients(layer: torch.nn.Module, leaf: Tensor, out: Tensor) -> dict[str, Tensor]:
    """Gradients of the input and of all parameters for a fixed cotangent of out."""
    generator = torch.Generator().manual_seed(7)
    cotangent = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad((out * cotangent).sum(), [leaf, *parameters])
    return dict(zip(["x", *names], grads, strict=True))


LENGTHS = (6, 1, 11, 3)


def sequences_alone(layer: torch.nn.Module) -> dict[str, Tensor]:
    leaf = random_inputs(1, sum(LENGTHS), 36).requires_grad_()
    out = torch.cat([layer(part) for part in leaf.split(LENGTHS, dim=1)], dim=1)
    return gradients(layer, leaf, out)


def test_gradients_of_packed_sequences() -> None:
    layer = tiny_layer()
    leaf = random_inputs(1, sum(LENGTHS), 36).requires_grad_()
    out = layer(leaf, cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0))
    assert_close(gradients(layer, leaf, out), sequences_alone(layer), BOUND)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_gradients_of_padded_rows(side: str) -> None:
    layer = tiny_layer()
    leaf = random_inputs(1, sum(LENGTHS), 36).requires_grad_()
    longest = max(LENGTHS)
    rows, masks = [], []
    for part in leaf[0].split(LENGTHS):
        real = len(part)
        before = {"left": longest - real, "right": 0, "middle": 0}[side]
        if side == "middle":
            half = real // 2
            gap = part.new_full((longest - real, 36), 3.0)
            rows.append(torch.cat([part[:half], gap, part[half:]]))
            masks.append([True] * half + [False] * (longest - real) + [True] * (real - half))
        else:
            rows.append(torch.nn.functional.pad(part, (0, 0, before, longest - real - before), value=3.0))
            masks.append([False] * before + [True] * real + [False] * (longest - real - before))
    mask = torch.tensor(masks)
    out = layer(torch.stack(rows), mask)[mask].unsqueeze(0)
    assert_close(gradients(layer, leaf, out), sequences_alone(layer), BOUND)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_gradients_flow_through_the_cache(variant: str) -> None:
    layer, config = tiny_layer(**VARIANTS[variant]), tiny_config(**VARIANTS[variant])
    whole = random_inputs(2, 12, 36).requires_grad_()
    expected = gradients(layer, whole, layer(whole))
    leaf, cache = random_inputs(2, 12, 36).requires_grad_(), new_cache(config)
    parts = [layer(part, past_key_values=cache) for part in leaf.split([4, 5, 1, 1, 1], dim=1)]
    assert_close(gradients(layer, leaf, torch.cat(parts, dim=1)), expected, BOUND)


def test_inference_goes_on_from_what_training_left() -> None:
    layer, cache, x = tiny_layer(), new_cache(tiny_config()), random_inputs(2, 12, 36)
    first = layer(x[:, :7], past_key_values=cache)
    with torch.no_grad():
        rest = [layer(part, past_key_values=cache) for part in x[:, 7:].split([4, 1], dim=1)]
    assert_near(torch.cat([first, *rest], dim=1), layer(x), BOUND)
    first.sum().backward()


def test_reset_starts_anew() -> None:
    layer, cache, x = tiny_layer(), new_cache(tiny_config()), random_inputs(2, 6, 36)
    with torch.no_grad():
        layer(random_inputs(2, 5, 36, seed=1), past_key_values=cache)
        cache.reset()
        assert_near(layer(x, past_key_values=cache), layer(x), BOUND)
