"""A block of the models in vLLM: x + mix(RMSNorm(x)), then x + feed-forward(RMSNorm(x)), with vLLM's layers.

The names of the parts are those of `gka.hf`, but for projections that vLLM joins (`model.GKAForCausalLM`).

Legend: T tokens of a step.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope

from .layer import GKALayer


class SoftmaxAttention(nn.Module):
    """Softmax attention as in Qwen3, with the options of a GKAConfig: biases, norms of q and k, a window.

    Args:
        config: the GKAConfig of the model.
        vllm_config: vLLM's configuration.
        prefix: the name of the layer in the model.
        window: tokens that it sees; None means all.
    """

    def __init__(self, config: Any, vllm_config: Any, prefix: str, window: int | None) -> None:
        super().__init__()
        ranks, D, H, Hk = (
            get_tensor_model_parallel_world_size(),
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.head_dim, self.inner, self.inner_kv = D, H // ranks * D, max(Hk // ranks, 1) * D
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, D, H, Hk, bias=config.attention_bias, prefix=f"{prefix}.qkv_proj"
        )
        bias = config.attention_bias if config.attention_output_bias is None else config.attention_output_bias
        self.o_proj = RowParallelLinear(H * D, config.hidden_size, bias=bias, prefix=f"{prefix}.o_proj")
        self.q_norm = RMSNorm(D, eps=config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = RMSNorm(D, eps=config.rms_norm_eps) if config.use_qk_norm else None
        self.rotary_emb = get_rope(
            D, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        self.attn = Attention(
            H // ranks,
            D,
            D**-0.5,
            num_kv_heads=max(Hk // ranks, 1),
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=window,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """[T] and [T, hidden_size] -> [T, hidden_size]."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.inner, self.inner_kv, self.inner_kv], dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._by_head(q, self.q_norm), self._by_head(k, self.k_norm)
        q, k = self.rotary_emb(positions, q, k)
        out, _ = self.o_proj(self.attn(q, k, v))
        return out  # type: ignore[no-any-return]

    def _by_head(self, x: Tensor, norm: nn.Module) -> Tensor:
        by_head: Tensor = norm(x.unflatten(-1, (-1, self.head_dim)))
        return by_head.flatten(-2)


class FeedForward(nn.Module):
    """down(act(gate(x)) * up(x)).

    Args:
        config: the GKAConfig of the model.
        prefix: the name of the layer in the model.
    """

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [inner] * 2, bias=bias, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(inner, hidden, bias=bias, prefix=f"{prefix}.down_proj")
        silu = config.hidden_act in ("silu", "swish")
        self.act_fn = SiluAndMul() if silu else _ActAndMul(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size]."""
        joined, _ = self.gate_up_proj(x)
        out, _ = self.down_proj(self.act_fn(joined))
        return out  # type: ignore[no-any-return]


class _ActAndMul(nn.Module):
    """act(gate) * up for an activation of transformers, from both side by side."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.act = ACT2FN[name]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        y: Tensor = self.act(gate) * up
        return y


class Block(nn.Module):
    """One block of the model.

    Args:
        config: the GKAConfig of the model.
        vllm_config: vLLM's configuration.
        prefix: the name of the block in the model, which ends with its number.
        kind: its entry of `config.layer_types`.
    """

    def __init__(self, config: Any, vllm_config: Any, prefix: str, kind: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixes_by_state = kind == "linear_attention"
        if self.mixes_by_state:
            self.gka = GKALayer(config, vllm_config, f"{prefix}.gka")
        else:
            window = config.sliding_window if kind == "sliding_attention" else None
            self.self_attn = SoftmaxAttention(config, vllm_config, f"{prefix}.self_attn", window)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config, f"{prefix}.mlp")

    def forward(self, positions: Tensor, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Positions [T], x [T, hidden_size] and the sum of x and residual -> two whose sum is the output."""
        if residual is None:
            residual, x = x, self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x = self.gka(x) if self.mixes_by_state else self.self_attn(positions, x)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual
