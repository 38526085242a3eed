"""Tensor parallelism by transformers: the plan that `from_pretrained` follows with a `DistributedConfig`.

transformers' styles split single matrices. A GKA layer is split as a whole, by `gka.nn.head_parallel`, so it has a
style of its own, which is registered here. Softmax attention and feed-forward are as in transformers' Qwen3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from ..nn.projections import CONVOLUTIONS, PROJECTIONS

HEADS, PART = "gka_heads", "gka_heads_part"


class _Heads(TensorParallelLayer):
    """Splits a whole layer; transformers then reads the part of each tensor that the process has."""

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        from ..nn.head_parallel import split_heads  # needs torch.distributed, which not all builds have

        split_heads(module, mesh, src_data_rank=None)  # type: ignore[arg-type]
        return module


class _Part(TensorParallelLayer):
    """A module of such a layer: already split with it."""

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        return module


def plan(layer_types: Iterable[str], ours: bool, use_qk_norm: bool) -> dict[str, str]:
    """The plan of a model without its head, with rules for the layers that it has.

    Args:
        layer_types: as in `GKAConfig`.
        ours: whether "linear_attention" is a GKA layer; other mixers stay whole on every process.
        use_qk_norm: as in `GKAConfig`.
    """
    found = {f"layers.*.mlp.{name}_proj": "colwise" for name in ("gate", "up")}
    found["layers.*.mlp.down_proj"] = "rowwise"
    if ours and "linear_attention" in layer_types:
        found["layers.*.gka"] = HEADS
        parts = (*PROJECTIONS, *CONVOLUTIONS, "o_proj", "o_norm")
        found.update({f"layers.*.gka.{name}": PART for name in parts})
    if any(kind != "linear_attention" for kind in layer_types):
        found.update({f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"})
        found["layers.*.self_attn.o_proj"] = "rowwise"
        if use_qk_norm:
            found.update({f"layers.*.self_attn.{one}_norm": "replicated_with_grad_allreduce" for one in "qk"})
    return found


ALL_PARALLEL_STYLES.register(HEADS, _Heads())  # type: ignore[arg-type]  # as transformers' own
ALL_PARALLEL_STYLES.register(PART, _Part())  # type: ignore[arg-type]
