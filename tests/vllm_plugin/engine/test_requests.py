"""Requests that share an engine: each gets what transformers gives it alone, whatever the others do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import assert_equal, engine, engine_model, generated, metric, random_prompts

KINDS = ("pure", "hybrid")


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """A model, and an engine with it: at most 160 tokens a step, prefix caching."""
    folder = tmp_path_factory.mktemp("model")
    model = engine_model(request.param, folder)
    with engine(folder, max_num_batched_tokens=160, enable_prefix_caching=True) as llm:
        yield model, llm


def run(llm: Any, arrivals: list[tuple[int, list[int], int]], abort: tuple[int, int] | None = None) -> list[Any]:
    """What each request gets that arrives at a step, with a prompt and a number of tokens to generate.

    abort: a step, and the number of a request that ends then; it gets nothing.
    """
    from vllm import SamplingParams

    done: dict[str, Any] = {}
    step = 0
    while len(done) < len(arrivals) - (abort is not None):
        for number, (when, prompt, tokens) in enumerate(arrivals):
            if when == step:
                parameters = SamplingParams(
                    temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=2, detokenize=False
                )
                llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
        if abort is not None and step == abort[0]:
            llm.llm_engine.abort_request([str(abort[1])])
        done |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
        step += 1
        assert step < 300, "the engine does not end"
    assert not llm.llm_engine.has_unfinished_requests()
    return [done[key] for key in sorted(done, key=int)]


def test_requests_arrive_and_end_at_different_times(served: tuple[Any, Any]) -> None:
    """Nine of them, four at a time; prompts longer than a step are prefilled in parts while others decode."""
    model, llm = served
    prompts = random_prompts(3, 1, 170, 20, 333, 2, 161, 64, 5)
    arrivals = [0, 0, 2, 3, 3, 9, 12, 13, 20]
    tokens = [30, 2, 9, 1, 12, 25, 7, 3, 14]
    outputs = run(llm, list(zip(arrivals, prompts, tokens, strict=True)))
    assert [len(output.outputs[0].token_ids) for output in outputs] == tokens
    assert_equal(model, outputs)


def test_an_aborted_request_leaves_the_others_alone(served: tuple[Any, Any]) -> None:
    """Its rows of the pools go to the request that comes next."""
    model, llm = served
    prompts = random_prompts(9, 50, 31, 12, 40, seed=2)
    arrivals = [0, 0, 0, 0, 6]
    requests = [(when, prompt, 20) for when, prompt in zip(arrivals, prompts, strict=True)]
    outputs = run(llm, requests, abort=(5, 1))
    assert [output.request_id for output in outputs] == ["0", "2", "3", "4"]
    assert_equal(model, outputs)


def test_shared_prefixes_come_from_the_cache(served: tuple[Any, Any]) -> None:
    """States and last inputs of the convolutions of whole blocks are found, and resumed from."""
    model, llm = served
    block = llm.llm_engine.vllm_config.cache_config.block_size
    shared, *tails = random_prompts(2 * block + 10, 5, 1, 40, seed=3)
    first = generated(llm, [shared + tails[0]])
    rest = generated(llm, [shared + tail for tail in tails[1:]])
    again = generated(llm, [shared + tails[0]])
    assert first[0].num_cached_tokens == 0
    assert all(output.num_cached_tokens >= block for output in (*rest, *again))
    assert_equal(model, [*first, *rest, *again])


@pytest.mark.parametrize(("blocks", "caching"), [(8, False), (11, True)], ids=["", "prefix caching"])
def test_requests_without_room_are_preempted_and_resumed(blocks: int, caching: bool, tmp_path: Path) -> None:
    """The cache holds the blocks of two of three requests until they need another one each."""
    model = engine_model("hybrid", tmp_path)
    room = dict(num_gpu_blocks_override=blocks, max_model_len=256, max_num_batched_tokens=160)
    with engine(tmp_path, enable_prefix_caching=caching, **room) as llm:
        block = llm.llm_engine.vllm_config.cache_config.block_size
        outputs = generated(llm, random_prompts(block - 20, block - 10, 30), tokens=60)
        assert metric(llm, "vllm:num_preemptions") > 0
    assert_equal(model, outputs)
