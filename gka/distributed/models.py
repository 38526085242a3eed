"""Language models under context parallelism: whole batches in, each rank computes its part.

Every rank calls the model with the same batch. The model cuts it, and sums the loss of its part over the ranks:

    labels     shifted first, cut then: the label of a rank's last token is the first token of the next rank
    loss       sum over all ranks of the losses of their tokens / tokens with a label, on every rank
    gradients  their mean over the ranks, as DDP and FSDP average, is the gradient of that loss

Legend: B batch, T tokens of the global rows, t tokens of this rank, N packed sequences.
"""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.distributed.device_mesh import DeviceMesh
from transformers import AttentionInterface

from ..hf.config import GKAConfig
from ..hf.inputs import packing_of_call, padding_mask, positions
from ..hf.mixers import OURS
from ..hf.model import GKAForCausalLM, GKAModel
from .agreement import described
from .attention import NAME, attend
from .collectives import all_reduce
from .context_parallel import ContextParallel
from .part import Part
from .shard import Shard

MESH_DIM = "cp"
_OF_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_OF_TOKENS = ("input_ids", "inputs_embeds", "position_ids", "labels", "shift_labels")

AttentionInterface.register(NAME, attend)


def parallelize(model: GKAModel | GKAForCausalLM, mesh: DeviceMesh | ContextParallel) -> ContextParallel:
    """Let the ranks of a mesh share the tokens of every batch of a model. It is changed in place.

    From then on every rank calls the model with the same whole batch: input_ids or inputs_embeds, labels,
    attention_mask, position_ids, and all ways to tell packed sequences. Logits and hidden states are those of this
    rank's tokens, the loss is that of all. Packed rows are joined into one. `context.shard(T).gather` makes a
    global tensor of those of the ranks. Wrap the model in DDP or FSDP afterwards, over all ranks.

    Args:
        model: the model; its mixer is one of this library.
        mesh: a DeviceMesh with a dim "cp" or with a single dim; or a ContextParallel, to choose the layout.

    Returns:
        The ContextParallel.

    Raises:
        TypeError: the model is another one.
        ValueError: the model has a registered mixer, is parallel already, or the mesh has no dim "cp".
        RanksDisagree: another rank has another configuration. Calls of the model raise it for other arguments.
    """
    if not isinstance(model, GKAModel | GKAForCausalLM):
        raise TypeError(f"model is a {type(model).__name__}; expected a GKAModel or a GKAForCausalLM")
    if "linear_attention" in model.config.layer_types and model.config.mixer not in OURS:
        raise ValueError(f"model has the mixer {model.config.mixer!r}; expected one of {OURS}")
    if model.shared_tokens is not None:
        raise ValueError("model shares its tokens already; expected one call of parallelize")
    context = mesh if isinstance(mesh, ContextParallel) else ContextParallel(_one_dim(mesh))
    context.agree({"call": "parallelize", "dtype": str(model.dtype), **_hyperparameters(model.config)})
    if model.config.has_attention:
        _own_config(model)
        model.set_attn_implementation(NAME)
    model.shared_tokens = SharedBatch(context)
    return context


def _hyperparameters(config: GKAConfig) -> dict[str, object]:
    return {name: value for name, value in config.to_dict().items() if not name.startswith("_")}


def _own_config(model: GKAModel | GKAForCausalLM) -> None:
    """Give the model a configuration that no other model has: its attention implementation is in there."""
    shared = model.config
    own = copy.deepcopy(shared)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own  # type: ignore[assignment]


def _one_dim(mesh: DeviceMesh) -> DeviceMesh:
    names = mesh.mesh_dim_names or ()
    if MESH_DIM in names and mesh.ndim > 1:
        return mesh[MESH_DIM]
    if mesh.ndim > 1:
        raise ValueError(f"mesh has the dims {names or mesh.ndim}; expected one of them to be {MESH_DIM!r}")
    return mesh


class SharedBatch:
    """What a model calls with its arguments and with its output (`gka.hf.shared_tokens`)."""

    def __init__(self, context: ContextParallel) -> None:
        self.context = context

    @_disable_dynamo
    def cut(self, config: GKAConfig, call: dict[str, Any]) -> dict[str, Any]:
        """This rank's arguments, from those of the whole batch."""
        self.context.agree({"call": "model", **described(call)})
        _check(call)
        return cut_batch(config, self.context, call)

    @_disable_dynamo
    def whole(self, call: dict[str, Any], output: Any) -> Any:
        """The output with the loss of all ranks in place of that of this rank's tokens."""
        if call.get("labels") is None:
            return output
        if isinstance(output, tuple):
            return (all_reduce(output[0], self.context.group), *output[1:])
        output.loss = all_reduce(output.loss, self.context.group)
        return output


def cut_batch(config: GKAConfig, context: ContextParallel, call: dict[str, Any]) -> dict[str, Any]:
    """This rank's arguments of a model, from those of the whole batch.

    Args:
        config: the configuration of the model.
        context: which tokens are whose.
        call: the arguments by name; tensors [B, T], or [B, T, hidden_size] of inputs_embeds.
    """
    call = {name: value for name, value in call.items() if value is not None}
    tokens = call["input_ids"] if "input_ids" in call else call["inputs_embeds"]
    mask = call.pop("attention_mask", None)
    packing = packing_of_call(config, tokens, mask, call.get("position_ids"), None, call)
    _shift_labels(call)
    (B, T), real = tokens.shape[:2], None
    if packing is None:
        real = padding_mask(mask, T)
        shard = context.shard(T)
        call.setdefault("position_ids", positions(tokens, mask, None, None))
    else:
        shard = context.shard(B * T, packing.cu_seqlens)
        _join_rows(call, packing.positions.to(tokens.device, non_blocking=True))
    if config.has_attention and shard.tokens < context.size:  # Qwen3's layers take no empty tensors
        raise ValueError(
            f"T is {shard.tokens}; expected at least {context.size}, a token for every process, with attention"
        )
    for name in _OF_PACKING:
        call.pop(name, None)
    return {
        **call,
        **{name: shard.take(call[name]).contiguous() for name in _OF_TOKENS if name in call},
        "attention_mask": _masks(config, shard, real),
        "use_cache": False,
        "context_parallel": Part(shard, real),
    }


def _shift_labels(call: dict[str, Any]) -> None:
    """Put the next tokens, and how many of them count, in place of labels that the model would shift."""
    if "labels" not in call:
        return
    ignored = call.get("ignore_index", -100)
    if "shift_labels" not in call:
        call["shift_labels"] = F.pad(call["labels"][..., 1:], (0, 1), value=ignored)
    call.setdefault("num_items_in_batch", (call["shift_labels"] != ignored).sum())


def _join_rows(call: dict[str, Any], positions: Tensor) -> None:
    """[B, T, ...] -> [1, B T, ...]; the positions [B, T] of a packing if there are no others."""
    call.setdefault("position_ids", positions)
    call["position_ids"] = call["position_ids"].expand(positions.shape)
    for name in _OF_TOKENS:
        if name in call:
            call[name] = call[name].flatten(0, 1).unsqueeze(0)


def _masks(config: GKAConfig, shard: Shard, real: Tensor | None) -> dict[str, Any]:
    """Masks by kind of layer: this rank's padding for GKA layers; attention reads it from the part."""
    masks: dict[str, Any] = dict.fromkeys(config.layer_types)
    if real is not None and "linear_attention" in masks:
        masks["linear_attention"] = shard.take(real)
    return masks


def _check(call: dict[str, Any]) -> None:
    """ValueError for an argument without a meaning where ranks share the tokens."""
    for name in ("past_key_values", "cache", "logits_to_keep", "num_logits_to_keep", "use_cache"):
        value = call.get(name)
        if value is not None and not (type(value) in (int, bool) and value == 0):
            raise ValueError(
                f"{name} is given to a model under context parallelism; expected none: it computes whole batches "
                "and keeps no cache, so generate() needs a model that is not parallel"
            )
    mask = call.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise ValueError("attention_mask is not [B, T]; expected 0 for padding and 1 for a token, or None")
    if (call.get("input_ids") is None) == (call.get("inputs_embeds") is None):
        raise ValueError("input_ids and inputs_embeds are both given or both missing; expected one of them")
