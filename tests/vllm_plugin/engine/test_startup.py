"""What vLLM cannot do with these models is refused when it starts, in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_helpers import engine_model

import gka
from gka.vllm import plugin

NGRAM = dict(method="ngram", num_speculative_tokens=2, prompt_lookup_max=3)


def configured(folder: Path, **options: Any) -> Any:
    """vLLM's configuration for a model, made as its engine and its server make it."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=64, **options)
    return arguments.create_engine_config()


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("pure", dict(speculative_config=NGRAM), "speculative_config is 'ngram'; expected none"),
        ("pure", dict(quantization="fp8"), "quantization is 'fp8'; expected none"),
        (
            "pure",
            dict(tensor_parallel_size=3),
            "tensor_parallel_size is 3; expected a divisor of num_attention_heads",
        ),
        (
            "heads expanded",
            dict(tensor_parallel_size=4),
            "tensor_parallel_size is 4; expected a divisor of num_key",
        ),
        ("pure", dict(pipeline_parallel_size=2), "pipeline_parallel_size is 2; expected 1"),
        ("pure", dict(hf_overrides={"solver_steps": [0]}), r"solver_steps is \[0\]; expected"),
        ("pure", dict(mamba_ssm_cache_dtype="float16"), "mamba_ssm_cache_dtype is 'float16'; expected one of"),
    ],
    ids=lambda value: None if isinstance(value, str) else ", ".join(value),
)
def test_refused(kind: str, options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    engine_model(kind, tmp_path)
    with pytest.raises(ValueError, match=sentence):
        configured(tmp_path, **options)


def test_another_version_is_an_error_for_these_models_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    engine_model("pure", tmp_path / "ours")
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=32)).save_pretrained(tmp_path / "other")
    configured(tmp_path / "ours")
    with monkeypatch.context() as patch:
        patch.setattr(plugin, "installed_version", lambda: "0.99.1")
        plugin.register()
        with pytest.raises(
            ValueError, match=rf"vllm is 0\.99\.1; gated-kalmanet {gka.__version__} supports 0\.32"
        ):
            configured(tmp_path / "ours")
        configured(tmp_path / "other")
    plugin.register()
    configured(tmp_path / "ours")


def test_registering_twice_changes_nothing() -> None:
    from vllm.config import CompilationConfig

    plugin.register()
    before = list(CompilationConfig._attention_ops)
    plugin.register()
    assert CompilationConfig._attention_ops == before
    assert before.count(f"vllm::{plugin.OPERATOR}") == 1
