"""Small Transformers of the families that are converted."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=40,
    intermediate_size=44,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_LLAMA_ROPE = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
_YARN = dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=32)
# Every switch of the four families, odd head dims where the family has them.
MODELS: dict[str, tuple[type[PreTrainedModel], Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, dict(head_dim=14, rope_parameters=_LLAMA_ROPE)),
    "llama with biases": (LlamaForCausalLM, LlamaConfig, dict(attention_bias=True, mlp_bias=True)),
    "mistral": (MistralForCausalLM, MistralConfig, dict(head_dim=6, sliding_window=None)),
    "mistral, sliding": (MistralForCausalLM, MistralConfig, dict(sliding_window=5, rms_norm_eps=1e-3)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen2, sliding": (
        Qwen2ForCausalLM,
        Qwen2Config,
        dict(use_sliding_window=True, sliding_window=4, max_window_layers=2, rope_parameters=_YARN),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, dict(head_dim=12, hidden_act="gelu", tie_word_embeddings=True)),
    "qwen3 with biases": (Qwen3ForCausalLM, Qwen3Config, dict(head_dim=10, attention_bias=True)),
}


def small(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of MODELS in eval mode, with biases and norms that are not 0 and 1."""
    cls, config_class, fields = MODELS[kind]
    torch.manual_seed(0)
    model = cls._from_config(config_class(**{**SIZES, **fields, **changes}), dtype=dtype).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value.add_(0.3 * torch.randn_like(value))
    return model
