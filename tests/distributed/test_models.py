"""Layers and models whose tokens several processes share, compared with one process (gloo, up to 4 processes)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks
from model_helpers import random_inputs, random_tokens, tiny_layer, tiny_model
from parallel_model_run import BROKEN, LAYERS, MODELS

from gka.distributed import ContextParallel, Part, parallelize

BOUND = 1e-10
PLAIN_LOSS = 1e-6  # of transformers, in float32


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    file = tmp_path_factory.mktemp("parallel") / "errors.json"
    run_ranks("-m", "parallel_model_run", str(file), processes=4)
    found: dict[str, dict[str, float]] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("case", [*(f"layer: {name}" for name in LAYERS), *(f"model: {name}" for name in MODELS)])
def test_results_are_those_of_one_process(errors: Any, case: str) -> None:
    """Outputs, losses, and gradients of all parameters and of the input."""
    assert len(errors[case]) > 5
    bound = PLAIN_LOSS if "plain loss" in case else BOUND
    wrong = {name: error for name, error in errors[case].items() if not error <= bound}
    assert not wrong, wrong


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_border_is_seen(errors: Any, name: str) -> None:
    found = errors[f"broken: {name}"]
    assert max(found.values()) > 1e-2
    assert (found["out"] > 1e-2) == (name == "no halo"), "without its gradients the output is right"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A group of this process alone."""
    place = tmp_path_factory.mktemp("alone") / "store"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (dict(cu_seqlens=torch.tensor([0, 2, 6])), "cu_seqlens"),
        (dict(return_state=True), "return_state"),
    ],
)
def test_a_layer_refuses_what_a_part_excludes(alone: Any, given: dict[str, Any], name: str) -> None:
    layer, x = tiny_layer(), random_inputs(1, 6, 36)
    with pytest.raises(ValueError, match=f"{name} is given under context parallelism"):
        layer(x, context_parallel=Part(ContextParallel(alone).shard(6)), **given)


@pytest.mark.parametrize("given", [dict(use_cache=True), dict(logits_to_keep=1)])
def test_a_model_refuses_what_decoding_asks(alone: Any, given: dict[str, Any]) -> None:
    model = tiny_model("hybrid")
    parallelize(model, ContextParallel(alone))
    with pytest.raises(ValueError, match=f"{next(iter(given))} is given to a model under context parallelism"):
        model(random_tokens(1, 6), **given)
    with pytest.raises(ValueError, match="past_key_values is given to a model under context parallelism"):
        model.generate(random_tokens(1, 6), max_new_tokens=2)


def test_parallelize_refuses_other_models_and_a_second_call(alone: Any) -> None:
    with pytest.raises(TypeError, match="model is a GatedKalmaNet; expected a GKAModel"):
        parallelize(tiny_layer(), ContextParallel(alone))  # type: ignore[arg-type]
    model = tiny_model()
    parallelize(model, ContextParallel(alone))
    with pytest.raises(ValueError, match="model shares its tokens already"):
        parallelize(model, ContextParallel(alone))


def test_attention_without_a_part_says_so(alone: Any) -> None:
    model = tiny_model("hybrid")
    parallelize(model, ContextParallel(alone))
    with pytest.raises(ValueError, match="called without context_parallel"):
        model.model(random_tokens(1, 6))


def test_a_padded_row_with_a_mask_of_other_values_is_refused(alone: Any) -> None:
    model = tiny_model()
    parallelize(model, ContextParallel(alone))
    with pytest.raises(ValueError, match="attention_mask"):
        model(random_tokens(1, 6), attention_mask=torch.ones(1, 1, 6, 6))


def test_the_implementation_of_attention_is_not_saved(alone: Any, tmp_path: Path) -> None:
    model = tiny_model("hybrid")
    parallelize(model, ContextParallel(alone))
    model.save_pretrained(tmp_path)
    assert "gka_context_parallel" not in (tmp_path / "config.json").read_text()
