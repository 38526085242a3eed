"""What vLLM knows of a step's requests, in the form of `core.Requests`; made once a step, for all layers.

vLLM puts decode steps first. A row of a captured graph without a request has vLLM's null block, which is block 0;
here it gets slot -1, which nothing is written to. The slots of decode steps stay in one buffer, because a captured
graph reads them where they were.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata, BaseMambaAttentionMetadataBuilder
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from .core import Prefill, Requests
from .states import conv_width


@dataclass
class GKAMetadata(BaseMambaAttentionMetadata):
    """vLLM's metadata, and the same as `Requests`."""

    requests: Requests = field(default_factory=Requests)


class GKAMetadataBuilder(BaseMambaAttentionMetadataBuilder[GKAMetadata]):
    """Makes the metadata of a step, for all layers of a group."""

    metadata_cls = GKAMetadata
    needs_causal_conv1d_metadata = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.conv_width = conv_width(vllm_config.model_config.hf_config)
        rows = max(vllm_config.scheduler_config.max_num_seqs, self.decode_cudagraph_max_bs)
        self.decode_slots = torch.full((rows,), -1, dtype=torch.int32, device=device)

    def _update_metadata_for_cudagraph_capture(self, metadata: GKAMetadata) -> GKAMetadata:
        """As vLLM's, the last step of each of its ways to make metadata; adds the requests."""
        metadata = super()._update_metadata_for_cudagraph_capture(metadata)
        metadata.requests = self._requests(metadata)
        return metadata

    def _requests(self, metadata: GKAMetadata) -> Requests:
        decode_slots = prefill_slots = prefill = None
        if metadata.num_decodes:
            blocks = metadata.state_indices_tensor_d[:, 0]
            decode_slots = self.decode_slots[: blocks.shape[0]]
            decode_slots.copy_(slots_of(blocks))
        if metadata.num_prefills:
            prefill_slots = slots_of(metadata.state_indices_tensor_p)
            prefill = Prefill.of(metadata.query_start_loc_p, metadata.num_prefill_tokens, self.conv_width)
        return Requests(
            decodes=metadata.num_decode_tokens,
            decode_slots=decode_slots,
            prefill_tokens=metadata.num_prefill_tokens,
            prefill_slots=prefill_slots,
            cu_seqlens=metadata.query_start_loc_p,
            has_state=metadata.has_initial_states_p,
            prefill=prefill,
        )


def slots_of(blocks: Tensor) -> Tensor:
    """The numbers of blocks, with -1 for the null block."""
    return torch.where(blocks == NULL_BLOCK_ID, -1, blocks)


class GKABackend(AttentionBackend):
    """The backend that vLLM finds by the name of `plugin.BACKEND`."""

    @staticmethod
    def get_name() -> str:
        """As vLLM logs it."""
        return "GKA"

    @staticmethod
    def get_builder_cls() -> type[GKAMetadataBuilder]:
        """The class that makes the metadata."""
        return GKAMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """Whether layers keep states instead of keys and values."""
        return True
