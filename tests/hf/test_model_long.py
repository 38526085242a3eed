"""Long generation keeps its memory: what the cache holds, and what the process holds."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from forked import run_forked
from model_helpers import FULL, GKA, cache_tensors, random_tokens, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList

HEADS, DIM = 4, 64


def keys_and_values(rows: int, early: int, tokens: int) -> int:
    """Bytes that a layer of softmax attention adds from token `early` to the last."""
    return 2 * rows * HEADS * DIM * 4 * (tokens - early)


class Meter(LogitsProcessor):
    """Reads, at some tokens of a generation, the bytes of the cache and of the process."""

    def __init__(self, cache: Any, when: tuple[int, ...]) -> None:
        self.cache, self.when, self.count = cache, when, 0
        self.cache_bytes: list[int] = []
        self.process_bytes: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.count += 1
        if self.count in self.when:
            gc.collect()
            held = cache_tensors(self.cache).values()
            self.cache_bytes.append(sum(tensor.untyped_storage().nbytes() for tensor in held))
            self.process_bytes.append(psutil.Process().memory_info().rss)
        return scores


def measure(layer_type: str, rows: int, early: int, tokens: int) -> tuple[int, int]:
    """Generate with a model of one layer: by how many bytes do the cache and the process grow?"""
    model = tiny_model(
        "gka",
        torch.float32,
        layer_types=[layer_type],
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        solver_steps=[5] if layer_type == GKA else None,
    )
    cache = model(random_tokens(rows, 3), use_cache=True).past_key_values
    cache.reset()
    meter = Meter(cache, (early, tokens))
    ids = model.generate(
        random_tokens(rows, 3),
        max_new_tokens=tokens,
        do_sample=False,
        past_key_values=cache,
        logits_processor=LogitsProcessorList([meter]),
    )
    assert ids.shape == (rows, 3 + tokens) and cache.get_seq_length() == 2 + tokens
    assert meter.cache_bytes[0] > 0
    cache_growth, process_growth = (b - a for a, b in (meter.cache_bytes, meter.process_bytes))
    return cache_growth, process_growth


def measure_alone(layer_type: str, rows: int, early: int, tokens: int) -> tuple[int, int]:
    """`measure` in a process of its own, which holds no freed memory of other tests to take from."""
    arguments = f"{layer_type!r}, {rows}, {early}, {tokens}"
    code = (
        f"import json, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import test_model_long; print(json.dumps(test_model_long.measure({arguments})))"
    )
    done = run_forked("-c", code)
    cache_growth, process_growth = json.loads(done.stdout.splitlines()[-1])
    return cache_growth, process_growth


@pytest.mark.slow
def test_memory_is_constant() -> None:
    rows, early, tokens = 16, 100, 1000
    cache_growth, process_growth = measure_alone(GKA, rows, early, tokens)
    assert cache_growth == 0
    assert process_growth < keys_and_values(rows, early, tokens) / 3


@pytest.mark.slow
def test_the_meter_sees_a_cache_that_grows() -> None:
    rows, early, tokens = 16, 100, 600
    cache_growth, process_growth = measure_alone(FULL, rows, early, tokens)
    assert cache_growth == keys_and_values(rows, early, tokens)
    assert process_growth > 2 * keys_and_values(rows, early, tokens) / 3
