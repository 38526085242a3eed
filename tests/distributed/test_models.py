"""Layers and models whose tokens several processes share, compared with one process (gloo, up to 4 processes)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import relative_error
from model_helpers import random_inputs, random_tokens, tiny_layer, tiny_model
from parallel_models import (
    BROKEN,
    LAYERS,
    MODELS,
    batch_of,
    broken_errors,
    fsdp_errors,
    hidden_state_errors,
    layer_errors,
    lora_errors,
    model_errors,
)
from ranks import Ranks
from reads import Reads
from torch._dynamo.testing import CompileCounter

from gka.distributed import ContextParallel, Part, Shard, parallelize
from gka.ops import checks

BOUND = 1e-10
PLAIN_LOSS = 1e-6  # of transformers, in float32


def assert_small(errors: dict[str, float], bound: float) -> None:
    assert len(errors) > 5
    wrong = {name: error for name, error in errors.items() if not error <= bound}
    assert not wrong, wrong


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_is_that_of_one_process(ranks: Ranks, case: str) -> None:
    """Output, and gradients of all parameters and of the input."""
    assert_small(ranks.run(LAYERS[case]["n"], layer_errors, LAYERS[case])[0], BOUND)


@pytest.mark.parametrize("case", MODELS)
def test_a_model_is_that_of_one_process(ranks: Ranks, case: str) -> None:
    """Logits, loss, and gradients of all parameters and of embeddings that are given."""
    bound = PLAIN_LOSS if case == "plain loss" else BOUND
    assert_small(ranks.run(MODELS[case]["n"], model_errors, MODELS[case])[0], bound)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_fsdp_averages_to_the_gradients_of_one_process(ranks: Ranks, dtype: torch.dtype | None) -> None:
    assert_small(ranks.run(2, fsdp_errors, dtype)[0], PLAIN_LOSS if dtype is None else 0.15)


def test_hidden_states_are_those_of_one_process(ranks: Ranks) -> None:
    errors = ranks.run(3, hidden_state_errors)[0]
    assert len(errors) == 4 and max(errors.values()) < BOUND


def test_copies_with_adapters_take_whole_batches_too(ranks: Ranks) -> None:
    pytest.importorskip("peft")
    assert_small(ranks.run(2, lora_errors)[0], PLAIN_LOSS)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_border_is_seen(ranks: Ranks, name: str) -> None:
    found = ranks.run(4, broken_errors, name)[0]
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


def test_models_of_one_configuration_keep_their_own_attention(alone: Any) -> None:
    """One of them shares its tokens, the other, such as a teacher, does not."""
    model, other = tiny_model("hybrid"), tiny_model("hybrid")
    other = type(model)(model.config).double()
    parallelize(model, ContextParallel(alone))
    tokens = random_tokens(1, 6)
    assert other(tokens).logits.shape == model(tokens).logits.shape
    assert other.config._attn_implementation != model.config._attn_implementation
    assert model.model.config is model.config


def test_attention_computes_in_the_dtype_of_autocast(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of one process does; rotary embeddings leave queries and keys in float32."""
    model, seen, gather = tiny_model("hybrid").float(), [], Shard.gather
    parallelize(model, ContextParallel(alone))

    def watched(shard: Shard, x: torch.Tensor, dim: int) -> torch.Tensor:
        seen.append(x.dtype)
        return gather(shard, x, dim)

    monkeypatch.setattr(Shard, "gather", watched)
    with torch.autocast("cpu", torch.bfloat16):
        model(random_tokens(1, 6))
    assert seen == [torch.bfloat16]


def test_packed_rows_have_no_mask(alone: Any) -> None:
    part = Part(ContextParallel(alone).shard(6, [0, 2, 6]))
    with pytest.raises(ValueError, match="attention_mask is given with packed sequences"):
        tiny_layer()(random_inputs(1, 6, 36), torch.ones(1, 6), context_parallel=part)


def test_gradients_of_gradients_are_refused(alone: Any) -> None:
    part, x = Part(ContextParallel(alone).shard(6)), random_inputs(1, 6, 36).requires_grad_()
    out = tiny_layer()(x, context_parallel=part)
    with pytest.raises(RuntimeError, match="create_graph is True"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


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


@pytest.mark.parametrize("told", ["rows", "padded", "packed"])
def test_training_waits_for_nothing(alone: Any, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward pass of a hybrid; the CPU is taken for a device that makes one wait."""
    monkeypatch.delenv("GKA_CHECK_VALUES", raising=False)
    model = tiny_model("hybrid, all three")
    parallelize(model, ContextParallel(alone))
    batch = batch_of(
        1 if told == "packed" else 3, 24, {"padded": "attention_mask", "packed": "cu_seq_lens_q"}.get(told), False
    )
    model(**batch).loss.backward()  # tables are made once
    monkeypatch.setattr(checks, "NEVER_WAITING", ())
    with Reads() as reads:
        model(**batch).loss.backward()
    assert not reads.seen


def test_another_packing_compiles_nothing_anew(alone: Any) -> None:
    """Around the exchanges; loss and gradients are those of the model that is not compiled."""
    model, tokens = tiny_model("hybrid"), random_tokens(1, 16)
    parallelize(model, ContextParallel(alone))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    seen = []
    for edges in ([0, 3, 16], [0, 5, 11, 16]):
        batch = {"input_ids": tokens, "labels": tokens, "cu_seq_lens_q": torch.tensor(edges)}
        losses = [each(**batch).loss for each in (model, compiled)]
        expected, found = (torch.autograd.grad(loss, [*model.parameters()]) for loss in losses)
        assert relative_error(losses[1], losses[0]) < BOUND
        assert max(map(relative_error, found, expected)) < BOUND
        seen.append(counter.frame_count)
    assert 0 < seen[0] == seen[1]
    torch.compiler.reset()
