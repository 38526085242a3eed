"""Tensor parallelism, FSDP2 and both, in four CPU processes (gloo); checkpoints between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sharding_run
from model_helpers import tiny_config
from ranks import Ranks
from sharding_run import CASES, HALVES, LOADED, NARROW, call

EXACT = 1e-10
IN_HALVES = sum(HALVES, ())


@pytest.fixture(scope="module")
def halves(ranks: Ranks) -> list[dict[str, Any]]:
    """What each process has found of what two processes do."""
    return ranks.run(4, call, sharding_run.of_halves)


@pytest.fixture(scope="module")
def checkpoints(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has found of checkpoints."""
    return ranks.run(4, call, sharding_run.checkpoints, tmp_path_factory.mktemp("sharding"))


def those_with(name: str, halves: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What was found by the half that ran the case."""
    found = [seen[name] for seen in halves if name in seen]
    assert len(found) == 2
    return found


def assert_all_below(found: dict[str, float], bound: float) -> None:
    assert found
    worst = max(found, key=found.__getitem__)
    assert found[worst] <= bound, worst


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_one_process(ranks: Ranks, name: str, request: pytest.FixtureRequest) -> None:
    """Loss, all gradients, and all weights after a step of the optimiser."""
    if name in IN_HALVES:
        seen = those_with(name, request.getfixturevalue("halves"))
    else:
        seen = ranks.run(4, call, sharding_run.like_one_process, name)
    for found in seen:
        assert_all_below(found, EXACT)


def test_without_the_sum_over_heads_it_would_not_be(halves: list[dict[str, Any]]) -> None:
    """The gradient of the norm that all heads share needs a sum; nothing else changes without it."""
    for found in those_with("without the sum", halves):
        wrong = {name for name, error in found.items() if error > 1e-3 and name.startswith("gradient")}
        assert wrong == {f"gradient of model.layers.{n}.gka.o_norm.weight" for n in range(2)}


def test_a_compiled_block_has_the_same_gradients(halves: list[dict[str, Any]]) -> None:
    for found in those_with("compiled", halves):
        assert_all_below(found, EXACT)


def test_states_have_the_heads_of_the_process(halves: list[dict[str, Any]]) -> None:
    """And a loss through them alone has all gradients; so have packed and padded rows their outputs."""
    for found in those_with("layer", halves):
        assert len(found) == 10
        assert_all_below(found, EXACT)


REASONS = {
    "heads": "num_heads is 6; expected a multiple of the mesh's size, 4",
    "key/value heads": "num_kv_heads is 2; expected a multiple of the mesh's size, 4",
    "softmax heads": "num_key_value_heads is 2; expected a multiple of the mesh's size, 4",
    "feed-forward": "intermediate_size is 43; expected a multiple of the mesh's size, 2",
    "expanded heads": "kv_proj_rank is 3; expected None",
    "adapter": "q_proj.extra",
    "twice": "sharded already",
    "two dims": "mesh has 2 dims; expected one",
    "other layer": "module is a Linear; expected a GatedKalmaNet",
    "no dim of data": "expected 'dp_shard'",
    "rows that are not shared": "call parallelize first",
    "sharded twice": "sharded by FSDP already",
    "attention of another model": "['4 linear maps stay whole on every process",
}


def test_what_cannot_be_shared_is_refused(ranks: Ranks) -> None:
    found = ranks.run(4, call, sharding_run.refused)[0]
    assert found.keys() == REASONS.keys()
    for name, reason in REASONS.items():
        assert reason in found[name], name


@pytest.mark.parametrize("name", NARROW)
def test_decays_are_not_rounded(ranks: Ranks, name: str) -> None:
    """Blocks compute in bfloat16, as a model whose weights were converted with what their rounding leaves out."""
    for found in ranks.run(4, call, sharding_run.in_bfloat16, NARROW[name]):
        assert found["from narrow"] == 0.0 or name != "FSDP"
        assert found["dtypes"] == ["torch.float32"]
        for what in ("logits", "A_log"):
            assert found[f"{what}, shared"] <= 2 * found[f"{what}, narrow"]


@pytest.mark.parametrize("name", LOADED)
def test_a_checkpoint_moves_to_another_mesh(checkpoints: list[dict[str, Any]], name: str) -> None:
    """Saved by FSDP 2 x TP 2, weights and moments, loaded into empty models: the next step is the same."""
    for seen in checkpoints:
        assert_all_below(seen[name], EXACT)


def test_the_whole_weights_are_exported(checkpoints: list[dict[str, Any]]) -> None:
    for seen in checkpoints:
        found = seen["exported"]
        decays = {name: found.pop(name) for name in list(found) if name.endswith(("A_log", "dt_bias"))}
        assert_all_below(found, 0.0)
        assert_all_below(decays, 1e-6)  # transformers loads them in float32


def test_transformers_splits_a_model(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks.run(4, call, sharding_run.by_transformers, tmp_path):
        assert_all_below(found["gradients"], EXACT)
        assert found["tokens"] and found["local heads"] == 1 and found["local decay"]
        assert found["lost"] == []


def test_the_plan_has_rules_for_the_layers_of_the_model() -> None:
    """transformers warns of rules without a layer."""
    kinds = {"gka": True, "hybrid": True, "hybrid, attention first": True}
    for kind in kinds:
        config = tiny_config(kind)
        plan = config.base_model_tp_plan
        assert ("layers.*.self_attn.o_proj" in plan) == config.has_attention
        assert ("layers.*.self_attn.q_norm" in plan) == (config.has_attention and config.use_qk_norm)
        assert plan["layers.*.gka"] == "gka_heads"
        assert "tp_plan" not in str(config.to_dict())
