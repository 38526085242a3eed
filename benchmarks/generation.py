"""Decoding with a whole model through `generate`, with a recorded step (CUDA graph) and without.

"eager" launches every kernel of every token; "graph" replays a recorded step (`gka.hf.captured_step`), and runs
on a GPU only. Weights are random, in bfloat16, and decoding is greedy. The model is a recipe's, once as it is
and once with softmax attention in every fourth layer.

Times are for a prompt of 16 tokens and `tokens` new ones, after one call, and the tokens per second are those
of all rows together. `first seconds` is the time of that first call, with everything that is compiled and
recorded in it. `equal` is the part of the tokens that are the same as without a graph.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import medians
from gka import GKAConfig, GKAForCausalLM

PROMPT, VOCABULARY = 16, 32000
MODELS = ("pure", "hybrid")


def make_model(recipe: Path, name: str, device: torch.device) -> GKAForCausalLM:
    """The model of a recipe, with softmax attention in every fourth layer if it is "hybrid"."""
    torch.manual_seed(0)
    config = GKAConfig.from_recipe(recipe, vocab_size=VOCABULARY)
    if name == "hybrid":
        types = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(config.num_hidden_layers)]
        config = GKAConfig.from_recipe(recipe, vocab_size=VOCABULARY, layer_types=types)
    with device:
        return GKAForCausalLM(config).to(torch.bfloat16).eval()


def generation(model: Any, prompt: Tensor, tokens: int, *, eagerly: bool) -> Tensor:
    """The new tokens, [B, tokens]."""
    text = model.generate(
        prompt, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0, disable_compile=eagerly
    )
    return text[:, prompt.shape[1] :]


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each model, batch size and way to decode."""
    device, ways = options.device, {"eager": True, "graph": False}
    if device.type != "cuda":
        print("a graph needs a GPU; decoding with one is not measured")
        del ways["graph"]
    for name in MODELS:
        model = make_model(options.model, name, device)
        parameters = sum(x.numel() for x in model.parameters())
        for B in options.batches or (1, 64):
            prompt = torch.randint(VOCABULARY, (B, PROMPT), device=device)
            functions, texts, first = {}, {}, {}
            for way, eagerly in ways.items():
                functions[way] = partial(generation, model, prompt, options.tokens, eagerly=eagerly)
                start = time.perf_counter()
                texts[way] = functions[way]().cpu()
                first[way] = time.perf_counter() - start
            for way, seconds in medians(functions, device, options.repeats).items():
                rate = B * options.tokens / seconds["median"]
                yield {
                    "part": "model",
                    "model": name,
                    "recipe": options.model.name,
                    "parameters": parameters,
                    "B": B,
                    "way": way,
                    "tokens": options.tokens,
                    "seconds": seconds,
                    "tokens per second": rate,
                    "first seconds": first[way],
                    "equal": (texts[way] == texts["eager"]).double().mean().item(),
                }
                print(f"{name:6s} B {B:3d} {way:5s} {rate:9.1f} tokens/s", flush=True)
