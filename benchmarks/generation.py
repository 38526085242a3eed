"""Decoding with a whole model through `generate`: by a recorded or compiled step, and without.

"eager" launches every kernel of every token; "graph" replays a recorded step (CUDA graph,
`gka.hf.captured_step`), on a GPU; "compiled" runs a step compiled by torch.compile (`gka.hf.compiled_step`), on a
CPU. Weights are random, in bfloat16 on a GPU and in float32 on a CPU, and decoding is greedy. The model is a
recipe's, once as it is and once with softmax attention in every fourth layer.

Times are for a prompt of 16 tokens and `tokens` new ones, after one call, and the tokens per second are those
of all rows together. `first seconds` is the time of that first call, with everything that is compiled and
recorded in it. `equal` is the part of the tokens that are those of "eager".
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
from transformers import CompileConfig

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
        model = GKAForCausalLM(config).eval()
    return model.to(torch.bfloat16) if device.type == "cuda" else model


def generation(model: Any, prompt: Tensor, tokens: int, **way: Any) -> Tensor:
    """The new tokens, [B, tokens]."""
    text = model.generate(prompt, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **way)
    return text[:, prompt.shape[1] :]


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each model, batch size and way to decode."""
    device = options.device
    ways: dict[str, dict[str, Any]] = {"eager": {"disable_compile": True}}
    if not options.eager:
        compiled = {"compiled": {"compile_config": CompileConfig()}}
        ways |= {"graph": {}} if device.type == "cuda" else compiled
    for name in MODELS:
        model = make_model(options.model, name, device)
        if name == "hybrid" and not model.config.has_attention:
            print(f"{options.model.name} has fewer than four layers: no hybrid")
            break
        parameters = sum(x.numel() for x in model.parameters())
        for B in options.batches or (1, 64):
            prompt = torch.randint(VOCABULARY, (B, PROMPT), device=device)
            functions, texts, first = {}, {}, {}
            for way, asked in ways.items():
                functions[way] = partial(generation, model, prompt, options.tokens, **asked)
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
                    "dtype": str(model.dtype).removeprefix("torch."),
                    "B": B,
                    "way": way,
                    "tokens": options.tokens,
                    "seconds": seconds,
                    "tokens per second": rate,
                    "first seconds": first[way],
                    "equal": (texts[way] == texts["eager"]).double().mean().item(),
                }
                print(f"{name:6s} B {B:3d} {way:5s} {rate:9.1f} tokens/s", flush=True)
