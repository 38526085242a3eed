"""One block of the models: x + mix(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)).

Legend: B batch, T time of this call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RMSNorm

from ..nn.layer import GatedKalmaNet
from ..nn.part import PartOfBatch
from ..ops.autocast import autocast_dtype
from .cache_name import named, takes_cache
from .config import GKAConfig
from .mixers import OURS, registered_mixer
from .packing import Packing

_OUTPUTS = ("o_proj", "out_proj", "down_proj")  # the projections into the residual stream


def cast_once(x: Tensor) -> Tensor:
    """x in the dtype of autocast, where it is on. Otherwise every projection of x casts it and keeps a copy."""
    dtype = autocast_dtype(x.device)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)  # autocast leaves float64 as it is


class RMSNorm(Qwen3RMSNorm):
    """RMSNorm as in Qwen3, bit for bit; in float32 under autocast by PyTorch's kernel.

    Qwen3's is six kernels forward and about ten backward, which each read and write all hidden states.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden], in the dtype of the input."""
        float32 = hidden_states.dtype == self.weight.dtype == torch.float32
        if float32 and autocast_dtype(hidden_states.device) is not None:
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        out: Tensor = super().forward(hidden_states)
        return out


class SoftmaxAttention(Qwen3Attention):
    """Softmax attention as in Qwen3; without its norms of queries and keys and with other biases, also as in
    Llama, Mistral and Qwen2.
    """

    def __init__(self, config: GKAConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[arg-type]  # it reads fields that ours has too
        if not config.use_qk_norm:
            self.q_norm = self.k_norm = nn.Identity()  # type: ignore[assignment]
        if config.attention_output_bias not in (None, config.attention_bias):
            self.o_proj = nn.Linear(self.o_proj.in_features, config.hidden_size, bias=config.attention_output_bias)


class GKABlock(GradientCheckpointingLayer):
    """One block of the model.

    Args:
        config: the configuration of the model; config.layer_types[layer_idx] decides the mixer of the block.
        layer_idx: number of the block.
    """

    def __init__(self, config: GKAConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.layer_type == "linear_attention" and config.mixer in OURS:
            self.gka = GatedKalmaNet.from_config(config, layer_idx)
        elif self.layer_type == "linear_attention":
            self.peer = registered_mixer(config.mixer)(config, layer_idx)
        else:
            self.self_attn = SoftmaxAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)  # Qwen3's, with a bias where config.mlp_bias
        for name, module in self.named_modules():
            if name.endswith(_OUTPUTS):
                module.first_factor = config.output_factor  # type: ignore[assignment]  # for _init_weights

    @takes_cache  # gradient checkpointing, which wraps this, takes the cache away by its name
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        packing: Packing | None = None,
        attention_arguments: dict[str, Any] | None = None,
        context_parallel: PartOfBatch | None = None,
    ) -> Tensor:
        """[B, T, hidden_size] -> [B, T, hidden_size].

        Args:
            hidden_states: [B, T, hidden_size].
            attention_mask: the mask for this kind of layer: [B, T] for GKA, that of transformers for softmax
                attention.
            past_key_values: the cache of the model.
            packing: the sequences of a packed batch.
            attention_arguments: other arguments of softmax attention, e.g. position_embeddings.
            context_parallel: the part of a batch that the tokens are, for GKA layers.
        """
        x = cast_once(self.input_layernorm(hidden_states))
        if self.layer_type != "linear_attention":
            mixed, _ = self.self_attn(
                x,
                attention_mask=attention_mask,
                **named(past_key_values),
                **(attention_arguments or {}),
            )
        else:
            mix = getattr(self, "gka", None) or self.peer
            if context_parallel is not None:
                mixed = mix(x, attention_mask, past_key_values, context_parallel=context_parallel)
            elif packing is None:
                mixed = mix(x, attention_mask, past_key_values)
            else:
                rows_joined = x.reshape(1, -1, x.shape[-1])
                mixed = mix(rows_joined, attention_mask, past_key_values, packing.cu_seqlens).view_as(x)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(cast_once(self.post_attention_layernorm(hidden_states)))
