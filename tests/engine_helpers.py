"""Small models in vLLM's engine, in this process on the CPU, and the same models in transformers."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Read when vLLM is imported.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
)
os.environ.pop("TRITON_INTERPRET", None)  # vLLM has kernels of its own, which no test here interprets

import torch
from torch import Tensor

from gka import GKAConfig, GKAForCausalLM

GKA, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
# vLLM's attention on the CPU takes heads of 32. The weights are large, so that nothing that goes wrong drowns.
SIZES: dict[str, Any] = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    initializer_range=0.2,
    max_position_embeddings=1024,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)


def rotary(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **options}


KINDS: dict[str, dict[str, Any]] = {
    "pure": dict(layer_types=[GKA, GKA]),
    "hybrid": dict(layer_types=[GKA, FULL, GKA]),
    "gla": dict(layer_types=[GKA, FULL], mixer="gla"),
    "heads expanded": dict(layer_types=[GKA, FULL], kv_proj_rank=3, kv_learnable_residual=True),
    "heads expanded, repeated": dict(layer_types=[GKA], kv_proj_rank=3),
    "all three": dict(
        layer_types=[SLIDING, GKA, FULL], sliding_window=16, attention_bias=True, mlp_bias=True, use_qk_norm=False
    ),
    "sliding alone": dict(layer_types=[GKA, SLIDING], sliding_window=5, attention_output_bias=True),
    "no gates": dict(
        layer_types=[GKA, GKA],
        use_alpha_connection=False,
        use_beta_gate=False,
        use_forget_gate=False,
        use_output_gate=False,
    ),
    "decay alone": dict(layer_types=[GKA], use_alpha_connection=False, use_beta_gate=False),
    "some gates": dict(layer_types=[GKA], use_forget_gate=False, use_v_conv=False, conv_size=1),
    "tied, without groups, cg": dict(
        layer_types=[GKA, FULL],
        tie_word_embeddings=True,
        num_key_value_heads=4,
        solver="cg",
        solver_steps=[30],
        hidden_act="gelu",
        conv_size=2,
    ),
    "odd heads": dict(layer_types=[GKA, GKA], num_attention_heads=3, num_key_value_heads=1, head_dim=10),
    "attention alone": dict(layer_types=[FULL]),
    "windows alone": dict(layer_types=[SLIDING, SLIDING], sliding_window=9),
    "linear rotary angles": dict(layer_types=[FULL, GKA], rope_parameters=rotary("linear", factor=2.0)),
    "yarn": dict(
        layer_types=[FULL, GKA], rope_parameters=rotary("yarn", factor=16.0, original_max_position_embeddings=64)
    ),
    "llama3": dict(
        layer_types=[FULL, GKA],
        rope_parameters=rotary(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=128,
        ),
    ),
    "one key head": dict(layer_types=[GKA, FULL], num_key_value_heads=1),
}


def engine_model(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> GKAForCausalLM:
    """A model of KINDS with random weights, saved to the folder as well."""
    torch.manual_seed(0)
    fields = {**SIZES, **KINDS[kind], **changes}
    model = GKAForCausalLM(GKAConfig(**{"num_hidden_layers": len(fields["layer_types"]), **fields}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(folder)
    return model.eval().requires_grad_(False)


def random_prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, SIZES["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """vLLM's LLM with a model of a folder; everything that it holds is freed."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = dict(
        skip_tokenizer_init=True, dtype="float32", max_model_len=1024, max_num_seqs=4, enforce_eager=True,
        enable_prefix_caching=False, disable_log_stats=False, max_logprobs=5, seed=0,
    )  # fmt: skip
    llm = LLM(str(folder), **{**settings, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def generated(llm: Any, prompts: Sequence[list[int]], tokens: int = 16, **options: Any) -> list[Any]:
    """What vLLM generates for all prompts at once, greedily, with the logarithms of probabilities."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=2, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return list(llm.generate(inputs, parameters, use_tqdm=False, **options))


def difference(model: GKAForCausalLM, output: Any) -> float:
    """The largest difference of a generated token's log-probability to transformers'.

    Raises AssertionError if a token is not the one that transformers finds most likely there.
    """
    prompt, tokens = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
    logprobs = next_logprobs(model, prompt + tokens[:-1])[len(prompt) - 1 :]
    assert logprobs.argmax(1).tolist() == tokens, f"prompt of {len(prompt)} tokens"
    found = [step[token].logprob for step, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
    expected = logprobs.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    return float((torch.tensor(found) - expected).abs().max())


def next_logprobs(model: GKAForCausalLM, tokens: list[int]) -> Tensor:
    """log p of the next token after each of the tokens [T, vocab_size], by one call of the model."""
    with torch.no_grad():
        logprobs: Tensor = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    return logprobs


def assert_equal(model: GKAForCausalLM, outputs: Sequence[Any], bound: float = 5e-3) -> None:
    """All tokens are those of transformers, and their log-probabilities within the bound.

    In float32 both differ by 1e-4 to 2e-3 from float64, and without a solve by 3e-6: the solve multiplies rounding
    by its condition number, up to 51.
    """
    worst = [difference(model, output) for output in outputs]
    print("largest differences of log-probabilities", [f"{x:.1e}" for x in worst])
    assert max(worst) < bound, worst


def metric(llm: Any, name: str) -> float:
    """The value of one of vLLM's counters."""
    (found,) = [each for each in llm.get_metrics() if each.name == name]
    return float(found.value)
