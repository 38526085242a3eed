"""Decoding on a CPU by torch.compile gives the tokens of decoding without, from one graph for all prompts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import PAD, random_tokens, tiny_model
from torch import Tensor
from transformers import CompileConfig, DynamicCache

from gka.hf import compiled_step, length


class Compiler:
    """A backend of torch.compile that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward

    def __deepcopy__(self, _: Any) -> Compiler:
        return self

    @property
    def config(self) -> CompileConfig:
        return CompileConfig(fullgraph=True, backend=self, mode=None)  # type: ignore[arg-type]


@pytest.fixture
def compiler() -> Compiler:
    torch._dynamo.reset()
    return Compiler()


def model_of(kind: str) -> Any:
    return tiny_model(kind, torch.float32, solver_steps=None if kind == "gla" else [3])


def generate(model: Any, tokens: Tensor, **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(tokens, **{"do_sample": False, "pad_token_id": PAD, "max_new_tokens": 7, **options})


def check(model: Any, tokens: Tensor, compiler: Compiler, **options: Any) -> None:
    found = generate(model, tokens, compile_config=compiler.config, **options)
    assert torch.equal(found, generate(model, tokens, **options))


@pytest.mark.parametrize("kind", ["gka", "gla", "hybrid", "hybrid, all three"])
def test_the_same_tokens_from_one_graph(kind: str, compiler: Compiler) -> None:
    model = model_of(kind)
    for T in (6, 1, 11):
        check(model, random_tokens(2, T), compiler)
    at_most = 3 if kind == "hybrid, all three" else 1  # a layer with a window counts its tokens in Python
    assert 1 <= compiler.graphs <= at_most


def test_padding_sampling_and_beams(compiler: Compiler) -> None:
    model, tokens = model_of("hybrid"), random_tokens(3, 5)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    check(model, tokens, compiler, attention_mask=mask)
    check(model, tokens, compiler, do_sample=True)
    check(model, tokens, compiler, num_beams=2)
    assert compiler.graphs >= 1


def test_the_cache_goes_on(compiler: Compiler) -> None:
    """It knows its length, and decodes on in either way."""
    model, tokens = model_of("gka"), random_tokens(1, 5)
    out = generate(model, tokens, compile_config=compiler.config, return_dict_in_generate=True)
    assert compiler.graphs == 1 and out.past_key_values.get_seq_length() == 5 + 7 - 1
    assert length.is_counter(out.past_key_values.layers[-1])
    more = generate(model, out.sequences, past_key_values=out.past_key_values)
    assert torch.equal(more, generate(model, tokens, max_new_tokens=14))


def test_only_where_it_is_asked_for(compiler: Compiler, caplog: pytest.LogCaptureFixture) -> None:
    model, tokens = model_of("gka"), random_tokens(1, 5)
    generate(model, tokens)
    generate(model, tokens, compile_config=compiler.config, disable_compile=True)
    assert compiler.graphs == 0
    model.generation_config.compile_config = compiler.config
    generate(model, tokens)
    assert compiler.graphs == 1 and "criteria for compilation" not in caplog.text
    generate(model, tokens, use_cache=False)
    assert compiler.graphs == 1 and "criteria for compilation" in caplog.text
    cache = DynamicCache(config=model.config)
    assert compiled_step.is_asked_for(model, model.generation_config, cache)
    assert not compiled_step.is_asked_for(model.to("meta"), model.generation_config, cache)


def test_copies_decode_with_their_own_weights(compiler: Compiler, tmp_path: Path) -> None:
    model, tokens = model_of("gka"), random_tokens(1, 5)
    check(model, tokens, compiler)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(generate(other, tokens), generate(model, tokens))
        with torch.no_grad():
            other.model.embed_tokens.weight.mul_(-1)
        check(other, tokens, compiler)
