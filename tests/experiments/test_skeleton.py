"""Models to compare: equal but for the mixer and the feed-forward width, which makes the parameters equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gka
from experiments.evidence.skeleton import TOLERANCE, count_parameters, skeleton
from experiments.peers import MIXERS
from gka import GKAForCausalLM

SIZES: dict[str, Any] = dict(
    vocab_size=101, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
)


@pytest.mark.parametrize("mixer", MIXERS)
@settings(max_examples=5)
@given(hidden=st.sampled_from([32, 64, 128, 256]), heads=st.sampled_from([1, 2, 4]), layers=st.integers(1, 4))
def test_parameters_are_equal(mixer: str, hidden: int, heads: int, layers: int) -> None:
    sizes = {**SIZES, "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_attention_heads": heads}
    sizes["num_hidden_layers"] = layers
    ours, other = (skeleton(m, **sizes) for m in ("gka", mixer))
    assert abs(count_parameters(other) / count_parameters(ours) - 1) <= TOLERANCE
    assert ours.intermediate_size == 3 * hidden


def test_counted_without_being_made() -> None:
    config = skeleton("mamba2", **SIZES)
    assert count_parameters(config) == gka.GKAForCausalLM(config).num_parameters()


@pytest.mark.parametrize("mixer", MIXERS)
def test_all_but_the_mixer_is_the_same(mixer: str) -> None:
    def outside(name: str) -> dict[str, Any]:
        model = gka.GKAForCausalLM(skeleton(name, **SIZES))
        parts = (".gka.", ".peer.", ".self_attn.", ".mlp.")
        return {n: p.shape for n, p in model.named_parameters() if not any(part in n for part in parts)}

    assert outside(mixer) == outside("gka")
    differ = {
        name
        for name, value in skeleton(mixer, **SIZES).to_dict().items()
        if value != skeleton("gka", **SIZES).to_dict()[name]
    }
    assert differ <= {"mixer", "intermediate_size", "layer_types"}


def test_a_hybrid_has_the_same_parameters() -> None:
    types = ["linear_attention", "full_attention"]
    ours, other = (skeleton(mixer, **SIZES, layer_types=types) for mixer in ("gka", "gdn"))
    assert abs(count_parameters(other) / count_parameters(ours) - 1) <= TOLERANCE
    with torch.no_grad():
        gka.GKAForCausalLM(other)(torch.zeros(1, 5, dtype=torch.int64))


def test_sizes_that_cannot_be_matched_are_refused() -> None:
    with pytest.raises(ValueError, match="no feed-forward width brings them within 2%"):
        skeleton(
            "mamba2", vocab_size=2, hidden_size=32, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1
        )
    with pytest.raises(ValueError, match="mixer is 'rwkv'"):
        skeleton("rwkv", **SIZES)


@pytest.mark.parametrize("mixer", MIXERS)
def test_first_weights_have_the_size_that_the_width_asks(mixer: str) -> None:
    """1 / sqrt(hidden_size), and sqrt(2 blocks) less where a block adds to the residual stream."""
    torch.manual_seed(0)
    model = GKAForCausalLM(skeleton(mixer, **SIZES))
    hidden, blocks = SIZES["hidden_size"], SIZES["num_hidden_layers"]
    weights = dict(model.named_parameters())
    outputs = [name for name in weights if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight"))]
    assert len(outputs) == 2 * blocks
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        assert weights[name].std().item() == pytest.approx(hidden**-0.5, rel=0.1)
    for name in outputs:
        assert weights[name].std().item() == pytest.approx((2 * blocks * hidden) ** -0.5, rel=0.1)
