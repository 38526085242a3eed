"""Language models of this library for vLLM: pure and hybrid, from its own checkpoints and published ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsHybrid,
    SupportsLoRA,
    SupportsMambaPrefixCaching,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from .blocks import Block
from .layer import GKALayer
from .states import LEAST_DECAY, state_dtypes, state_shapes, sum_dtype, weak_heads

logger = init_logger(f"vllm.{__name__}")  # in its tree, for its format and level

JOINED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}


# The dims that are not the same at each step; vLLM finds them only in types that are not strings.
@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0})
class GKAModel(nn.Module):
    """Embedding, blocks and the last norm.

    Args:
        vllm_config: vLLM's configuration.
        prefix: the name of the model in the whole.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, vllm_config, f"{prefix}.layers.{number}", kind)
            for number, kind in enumerate(config.layer_types)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[T] -> [T, hidden_size]."""
        embedded: Tensor = self.embed_tokens(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Token ids or embeddings, and positions, [T] each -> [T, hidden_size]."""
        x: Any = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in self.layers:
            x, residual = layer(positions, x, residual)
        x, _ = self.norm(x, residual)
        return x


class GKAForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsMambaPrefixCaching, SupportsLoRA):
    """The language model `gka.GKAForCausalLM` for vLLM.

    Args:
        vllm_config: vLLM's configuration.
        prefix: the name of the model in the whole.
    """

    packed_modules_mapping = JOINED
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}  # noqa: RUF012
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".q_conv1d": (".conv1d", "q"),
            ".k_conv1d": (".conv1d", "k"),
            ".v_conv1d": (".conv1d", "v"),
            ".a_proj": (".gates_proj", "a_proj"),
            ".b_proj": (".gates_proj", "b_proj"),
            ".alpha_proj": (".gates_proj", "alpha_proj"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.vllm_config = vllm_config
        self.model = GKAModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[T] -> [T, hidden_size]."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Token ids or embeddings, and positions, [T] each -> [T, hidden_size]."""
        out: Tensor = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        return out

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[R, hidden_size] -> [R, vocab_size]; None on all processes but the first, as vLLM wants it."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Read a checkpoint; the names that were read."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
        if sum_dtype(self.vllm_config.cache_config) == torch.bfloat16:
            self._warn_of_weak_decays()
        return loaded

    def _warn_of_weak_decays(self) -> None:
        layers = [module for module in self.modules() if isinstance(module, GKALayer)]
        weak = sum(weak_heads(layer.A_log, layer.dt_bias) for layer in layers)
        if weak:
            logger.warning(
                "mamba_ssm_cache_dtype is bfloat16, and %d of %d heads decay by less than %s per token: rounding "
                "makes such states wrong; expected float32 for this model",
                weak,
                sum(layer.heads for layer in layers),
                LEAST_DECAY,
            )

    # What vLLM asks before there is a model

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        """Shapes of what a request keeps in a GKA layer."""
        return state_shapes(vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        """Their dtypes."""
        return state_dtypes(vllm_config.model_config.hf_config, vllm_config)

    def get_mamba_state_copy_funcs(self, mamba_types: set[Any]) -> dict[Any, tuple[Any, ...]]:
        """How prefix caching copies each of them: whole rows."""
        number = len(state_dtypes(self.config, self.vllm_config))
        return {kind: (get_temporal_copy_spec,) * number for kind in mamba_types}
