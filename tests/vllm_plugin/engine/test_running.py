"""Ways to run a model in vLLM: published folders, solver steps, torch.compile, long prompts, two processes."""

from __future__ import annotations

from pathlib import Path

import published_helpers
import pytest
import torch
from engine_helpers import assert_equal, engine, engine_model, generated, random_prompts
from published_helpers import published_config, published_tensors, write_folder

from gka import GKAForCausalLM

PROMPTS = random_prompts(2, 7, 40, 150, 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_published_folder(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full attention, GKA and sliding attention; the weights as they are."""
    monkeypatch.setattr(published_helpers, "D", 32)
    config = published_config(
        "*-GKA-SWA",
        {"head_dim": 32, "num_iter": 20},
        head_dim=32,
        swa_config={"window_size": 16},
        dtype=str(dtype).removeprefix("torch."),
    )
    write_folder(tmp_path, config, published_tensors(config, dtype))
    model = GKAForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    vocabulary = model.config.vocab_size
    prompts = [[token % (vocabulary - 3) + 3 for token in prompt] for prompt in PROMPTS]
    with engine(tmp_path, max_num_batched_tokens=160, enable_prefix_caching=True) as llm:
        outputs = generated(llm, prompts)
    assert_equal(model, outputs)


def test_solver_steps_by_hf_overrides(tmp_path: Path) -> None:
    model = engine_model("pure", tmp_path)
    few = GKAForCausalLM.from_pretrained(tmp_path).eval()
    few.set_solver_steps([3])
    with engine(tmp_path, hf_overrides={"solver_steps": [3]}) as llm:
        outputs = generated(llm, PROMPTS)
    assert_equal(few, outputs)
    with pytest.raises(AssertionError):  # the steps do change what is generated
        assert_equal(model, outputs)


def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's default: torch.compile of everything but the operators with states."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm"))
    model = engine_model("hybrid", tmp_path)
    with engine(tmp_path, enforce_eager=False, max_num_batched_tokens=160) as llm:
        outputs = generated(llm, PROMPTS)
    assert_equal(model, outputs)


def test_prompt_of_20000_tokens(tmp_path: Path) -> None:
    """In parts of 2,048 tokens, while a short request decodes."""
    model = engine_model("pure", tmp_path, max_position_embeddings=32_768)
    (long, short) = random_prompts(20_000, 9)
    with engine(tmp_path, max_model_len=20_032, max_num_batched_tokens=2048) as llm:
        outputs = generated(llm, [short, long])
    assert_equal(model, outputs)


@pytest.mark.parametrize("kind", ["heads expanded", "one key head"])
def test_two_processes_share_the_heads(kind: str, tmp_path: Path) -> None:
    """With one key/value head both have it. An expansion of heads reads those of both."""
    model = engine_model(kind, tmp_path)
    shared, *tails = random_prompts(300, 5, 20, seed=3)
    with engine(tmp_path, tensor_parallel_size=2, max_num_batched_tokens=160, enable_prefix_caching=True) as llm:
        outputs = generated(llm, PROMPTS)
        outputs += generated(llm, [shared + tails[0]])
        outputs += generated(llm, [shared + tails[1]])
    assert outputs[-1].num_cached_tokens > 0
    assert_equal(model, outputs)
