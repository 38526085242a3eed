"""In bfloat16 vLLM and transformers part after some tokens: by rounding, which is as large in both.

The measure is the log-probability of the tokens that vLLM chose, compared with transformers in float32 with the
same weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import engine, engine_model, generated, next_logprobs, random_prompts
from torch import Tensor
from transformers import DynamicCache

from gka import GKAForCausalLM

TOKENS = 16
COMPARED = 24  # of the 64 requests, with transformers, and alone


def decoded_logprobs(model: GKAForCausalLM, prompt: list[int], tokens: list[int]) -> Tensor:
    """As `next_logprobs`, of the tokens that follow a prompt, one call of the model each."""
    cache = DynamicCache(config=model.config)
    logits = [model(torch.tensor([prompt]), past_key_values=cache).logits[0, -1]]
    for token in tokens[:-1]:
        logits.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    return torch.stack(logits).float().log_softmax(-1)


def chosen(output: Any) -> Tensor:
    """Log-probabilities of the tokens that vLLM chose."""
    steps = zip(output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True)
    return torch.tensor([step[token].logprob for step, token in steps])


def prefilled(llm: Any, outputs: list[Any]) -> list[Tensor]:
    """The same from vLLM's prefill of prompt and tokens."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=1, prompt_logprobs=1, detokenize=False)
    whole = [list(output.prompt_token_ids) + list(output.outputs[0].token_ids) for output in outputs]
    found = llm.generate([{"prompt_token_ids": tokens} for tokens in whole], parameters, use_tqdm=False)
    return [
        torch.tensor([each.prompt_logprobs[n][tokens[n]].logprob for n in range(-TOKENS, 0)])
        for each, tokens in zip(found, whole, strict=True)
    ]


def rms(differences: list[Tensor]) -> float:
    return float(torch.cat(differences).square().mean().sqrt())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pure", "hybrid"])
def test_bfloat16_differs_by_rounding(kind: str, tmp_path: Path) -> None:
    engine_model(kind, tmp_path, torch.bfloat16)
    wide, narrow = (
        GKAForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval() for dtype in (torch.float32, torch.bfloat16)
    )
    prompts = random_prompts(2, 7, 40, 150, 300, *range(10, 69))
    with engine(tmp_path, dtype="bfloat16", max_num_seqs=64, max_num_batched_tokens=2048) as llm:
        outputs = generated(llm, prompts, TOKENS)
        alone = [generated(llm, [prompt], TOKENS)[0] for prompt in prompts[:COMPARED]]
        prefills = prefilled(llm, outputs[:COMPARED])
    errors: dict[str, list[Tensor]] = {name: [] for name in ("vLLM", "vLLM, prefill", "transformers")}
    for output, prefill in zip(outputs[:COMPARED], prefills, strict=True):
        prompt, tokens = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        index = torch.tensor(tokens).unsqueeze(1)
        expected = next_logprobs(wide, prompt + tokens[:-1])[-TOKENS:].gather(1, index).squeeze(1)
        errors["vLLM"].append(chosen(output) - expected)
        errors["vLLM, prefill"].append(prefill - expected)
        own = decoded_logprobs(narrow, prompt, tokens).gather(1, index).squeeze(1)
        errors["transformers"].append(own - expected)
    found = {name: rms(differences) for name, differences in errors.items()}
    largest = {name: float(torch.cat(differences).abs().max()) for name, differences in errors.items()}
    batches = [together_and_alone(*pair) for pair in zip(outputs, alone, strict=False)]
    print(f"{kind}: rms {found}, largest {largest}, batch of 64 to 1: {rms(batches):.1e}")
    for name in ("vLLM", "vLLM, prefill"):
        assert found["transformers"] / 2 < found[name] < 1.5 * found["transformers"], found
    assert rms(batches) < 1.5 * found["transformers"]


def together_and_alone(one: Any, other: Any) -> Tensor:
    """Differences of log-probabilities up to the first token that is not the same."""
    same = torch.tensor(one.outputs[0].token_ids) == torch.tensor(other.outputs[0].token_ids)
    length = int(same.int().cumprod(0).sum())
    return (chosen(one) - chosen(other))[:length]


@torch.no_grad()
def test_float32_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    model = engine_model("hybrid", tmp_path)
    prompts = random_prompts(*range(1, 65))
    with engine(tmp_path, max_num_seqs=64, max_num_batched_tokens=2048) as llm:
        together = generated(llm, prompts, TOKENS)
        alone = [generated(llm, [prompt], TOKENS)[0] for prompt in prompts[:COMPARED]]
        prefills = prefilled(llm, together)
    by_batch = [together_and_alone(*pair) for pair in zip(together, alone, strict=False)]
    by_prefill = [chosen(output) - prefill for output, prefill in zip(together, prefills, strict=True)]
    expected = [
        next_logprobs(model, list(each.prompt_token_ids) + list(each.outputs[0].token_ids)[:-1])[-TOKENS:]
        .gather(1, torch.tensor(each.outputs[0].token_ids).unsqueeze(1))
        .squeeze(1)
        for each in together
    ]
    errors = [chosen(output) - each for output, each in zip(together, expected, strict=True)]
    print("float32: rms, largest")
    for name, differences in (("batch", by_batch), ("prefill", by_prefill), ("transformers", errors)):
        print(name, f"{rms(differences):.1e}, {float(torch.cat(differences).abs().max()):.1e}")
        assert rms(differences) < 1e-3
    assert all(len(each) == TOKENS for each in by_batch)
