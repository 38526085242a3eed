"""Convert a Transformer: replace attention layers with GKA layers.

    W_q, W_k, W_v, W_o   copied from the attention layer
    W_g                  = (W_o^T + W_v, its rows repeated for the query heads of a group) / 2
    other weights        new initial values

A GKA layer has no biases of q, k, v and o (Qwen2; Llama and Qwen3 with attention_bias), no norms of queries and
keys (Qwen3) and no rotary embedding. Replaced layers lose them; other layers keep them. All four families are
`GKAForCausalLM` with different switches and the same parameter names.

Legend: H query heads, Hk key/value heads, D head dim.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    LlamaPreTrainedModel,
    MistralPreTrainedModel,
    PreTrainedModel,
    Qwen2PreTrainedModel,
    Qwen3PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.utils import logging

from ..nn.layer import GatedKalmaNet
from .config import GKAConfig
from .heads import GKAForSequenceClassification, GKAForTokenClassification
from .mixers import OURS
from .model import GKAForCausalLM
from .pretrained import GKAPreTrainedModel

FAMILIES: dict[str, type[PreTrainedModel]] = {
    "llama": LlamaPreTrainedModel,
    "mistral": MistralPreTrainedModel,
    "qwen2": Qwen2PreTrainedModel,
    "qwen3": Qwen3PreTrainedModel,
    "gka": GKAPreTrainedModel,
}
_LINEAR = "linear_attention"
_SAME = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "hidden_act max_position_embeddings rope_parameters attention_dropout initializer_range rms_norm_eps "
    "use_cache tie_word_embeddings pad_token_id bos_token_id eos_token_id id2label label2id problem_type"
).split()

logger = logging.get_logger(__name__)


def convert(model: PreTrainedModel, layers: Sequence[int], **settings: Any) -> Any:
    """Copy a model and replace chosen attention layers with GKA layers.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 model of transformers, or a model of this library with attention
            layers: ForCausalLM, ForSequenceClassification or ForTokenClassification. It does not change.
        layers: numbers of the layers to replace, from 0; [] replaces none. Weights of new layers that are not
            copied are random; `torch.manual_seed` decides them.
        **settings: fields of GKAConfig for the new layers, such as ridge_ratio, solver_steps or use_v_conv.

    Returns:
        A GKAForCausalLM, GKAForSequenceClassification or GKAForTokenClassification with the same dtype, device and
        mode; it shares no memory with `model`.

    Raises:
        TypeError: the model belongs to another family, has another head or PEFT adapters, or layers are not
            integers.
        ValueError: a layer does not exist or is not an attention layer, a GKA layer does not support its sizes,
            the model is quantised, or a setting is invalid.
    """
    return _replace(model, layers, settings, with_projections=True)


def replace_by_fresh(model: PreTrainedModel, layers: Sequence[int], **settings: Any) -> Any:
    """As `convert`, but with random weights in the new layers; a baseline for copied projections."""
    return _replace(model, layers, settings, with_projections=False)


def attention_layers(model: PreTrainedModel) -> list[int]:
    """The numbers of the softmax attention layers of a model. Raises the errors of `convert`."""
    return [index for index, kind in enumerate(_config(model).layer_types) if kind != _LINEAR]


def _replace(
    model: PreTrainedModel, layers: Sequence[int], settings: dict[str, Any], *, with_projections: bool
) -> Any:
    source = _config(model)
    chosen = _chosen(layers, source)
    config = _with_layers(source, chosen, settings)
    config._attn_implementation = model.config._attn_implementation
    new = _converted_class(model)._from_config(config, dtype=model.dtype)
    weights: dict[str, Tensor] = model.state_dict()
    missing, unexpected = new.load_state_dict(
        {name: value for name, value in weights.items() if not _is_replaced(name, chosen)}, strict=False
    )
    wrong = [*(name for name in missing if not _is_replaced(name, chosen)), *unexpected]
    if wrong:
        raise ValueError(f"model has weights that its configuration does not name, or lacks some: {wrong}")
    for index in chosen:
        layer: GatedKalmaNet = new.model.layers[index].gka
        if with_projections:
            _take_over(layer, getattr(model.model, "layers")[index].self_attn, index)  # noqa: B009
    if new.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    return new.to(model.device).train(model.training)


def _converted_class(model: PreTrainedModel) -> Any:
    """The class of the converted model; None for a head that is not converted."""
    if isinstance(model, GenericForSequenceClassification):
        return GKAForSequenceClassification
    if isinstance(model, GenericForTokenClassification):
        return GKAForTokenClassification
    return GKAForCausalLM if isinstance(model, GenerationMixin) else None


@torch.no_grad()
def _take_over(layer: GatedKalmaNet, attention: nn.Module, index: int) -> None:
    old: dict[str, Tensor] = attention.state_dict()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(layer, name).weight.copy_(old[f"{name}.weight"])
    if layer.g_proj is not None:
        v = old["v_proj.weight"].unflatten(0, (layer.num_kv_heads, layer.head_dim))
        v = v.repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=0).flatten(0, 1)  # [H D, hidden]
        layer.g_proj.weight.copy_((old["o_proj.weight"].T + v) / 2)
    if biases := sorted(name for name in old if name.endswith(".bias")):
        logger.warning(f"layer {index}: a GKA layer has no place for {', '.join(biases)}; left out")


def _config(model: PreTrainedModel) -> GKAConfig:
    """The configuration with which a model of this library equals this model."""
    if isinstance(model, nn.Module) and any(hasattr(module, "base_layer") for module in model.modules()):
        raise TypeError(
            f"model is a {type(model).__name__} with PEFT adapters; call merge_and_unload() and convert the model "
            "that it returns"
        )
    if isinstance(model, str | os.PathLike):
        raise TypeError(f"model is {str(model)!r}; expected a model, from AutoModelForCausalLM.from_pretrained")
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in FAMILIES or not isinstance(model, FAMILIES[family]) or _converted_class(model) is None:
        of_family = f" of the family {family}" if family else ""
        raise TypeError(
            f"model is a {type(model).__name__}{of_family}; expected ForCausalLM, "
            f"ForSequenceClassification or ForTokenClassification of one of {', '.join(FAMILIES)}"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "model is quantised; load it without a quantisation, convert it, then quantise the result"
        )
    old: Any = model.config
    if isinstance(old, GKAConfig):
        return copy.deepcopy(old)
    fields = {name: getattr(old, name) for name in _SAME}
    if fields["pad_token_id"] is not None and fields["pad_token_id"] < 0:
        fields["pad_token_id"] = None  # some Llamas say -1 for none
    window = old.sliding_window if family != "llama" else None
    types = ["sliding_attention" if family == "mistral" and window else "full_attention"] * old.num_hidden_layers
    if family in ("qwen2", "qwen3"):
        types = list(old.layer_types)
    bias = family == "qwen2" or bool(getattr(old, "attention_bias", False))
    return GKAConfig(
        **fields,
        head_dim=getattr(old, "head_dim", None),  # type: ignore[arg-type]
        layer_types=types,
        sliding_window=window,
        attention_bias=bias,
        attention_output_bias=bias and family != "qwen2",
        mlp_bias=bool(getattr(old, "mlp_bias", False)),
        use_qk_norm=family == "qwen3",
    )


def _chosen(layers: Sequence[int], config: GKAConfig) -> list[int]:
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise TypeError(f"layers is {layers!r}; expected a sequence of integers such as [1, 3]")
    for index in layers:
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f"layers has {index!r}; expected integers")
        if not 0 <= index < config.num_hidden_layers:
            last = config.num_hidden_layers - 1
            raise ValueError(f"layers has {index}, and there is no such layer; expected 0 to {last}")
        if config.layer_types[index] == _LINEAR:
            raise ValueError(f"layers has {index}, which is no attention layer")
    if repeated := sorted({index for index in layers if layers.count(index) > 1}):
        raise ValueError(f"layers has {repeated[0]} more than once")
    return sorted(layers)


def _with_layers(source: GKAConfig, chosen: list[int], settings: dict[str, Any]) -> GKAConfig:
    types = [_LINEAR if index in chosen else kind for index, kind in enumerate(source.layer_types)]
    _check_names(settings)
    if (mixer := settings.get("mixer", source.mixer)) not in OURS:
        raise ValueError(f"mixer is {mixer!r}; expected one of {OURS} to convert to")
    if mixer != source.mixer and _LINEAR in source.layer_types:
        raise ValueError(
            f"mixer is {mixer!r}; expected {source.mixer!r}, that of the layers which the model has already"
        )
    fields = source.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        fields.pop(name, None)
    try:
        return GKAConfig(**{**fields, **settings, "layer_types": types})
    except ValueError as error:
        raise ValueError(f"the attention layers do not fit into GKA layers: {error}") from None


def settings_of_layers() -> list[str]:
    """The fields of GKAConfig that `convert` takes as settings of the new layers."""
    switches = [name for name in GKAConfig.__annotations__ if name.startswith("use_")]
    of_all = ("use_qk_norm", "use_cache")
    settings = ["ridge_ratio", "solver", "solver_steps", "tolerance", "chunk_size", "conv_size", "mixer"]
    return settings + [name for name in switches if name not in of_all]


def _check_names(settings: Iterable[str]) -> None:
    """Raise ValueError for a setting that `convert` does not take."""
    allowed = settings_of_layers()
    for name in settings:
        if name in allowed:
            continue
        if name in GKAConfig.__annotations__:
            raise ValueError(
                f"{name} is a field of GKAConfig that convert does not take; expected one of {allowed}"
            )
        near = difflib.get_close_matches(name, allowed, n=1)
        expected = f"did you mean {near[0]}?" if near else f"expected one of {allowed}"
        raise ValueError(f"{name} is no setting of the new layers; {expected}")


def _is_replaced(name: str, chosen: list[int]) -> bool:
    """Whether the parameter belongs to the attention of a chosen layer."""
    return any(
        name.startswith(f"model.layers.{index}.{part}.") for index in chosen for part in ("self_attn", "gka")
    )
