"""What all models of this library are to transformers: flags, loading and saving, first weights, the solver."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.integrations import is_fsdp_enabled

from ..nn.decay import whole_decay, with_rests
from ..nn.layer import GatedKalmaNet
from .block import GKABlock, SoftmaxAttention
from .cache_name import NEW, OLD
from .checkpoint import is_published, load_published
from .config import GKAConfig
from .mixers import OURS, registered_mixer
from .shared_tokens import SharedTokens

_GATES = (".a_proj", ".b_proj", ".alpha_proj")  # the ends of their names: projections to one number per head


class GKAPreTrainedModel(PreTrainedModel):
    """Base class of all models: flags for transformers, loading, initial weights."""

    config: GKAConfig
    config_class = GKAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GKABlock"]  # noqa: RUF012
    _skip_keys_device_placement = [OLD, NEW]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _is_stateful = True
    shared_tokens: SharedTokens | None = None  # set by gka.distributed.parallelize
    _can_record_outputs = {"hidden_states": GKABlock, "attentions": SoftmaxAttention}  # noqa: RUF012

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers. For a checkpoint in the published format, every tensor is checked first.

        Raises:
            gka.hf.checkpoint.BadCheckpoint: a published checkpoint is damaged, does not fit its configuration,
                or has only pickle files and `use_safetensors=False` is not given.
            ValueError: its configuration has something that this library does not support.
        """
        load = super().from_pretrained
        if pretrained_model_name_or_path is None or not is_published(pretrained_model_name_or_path, kwargs):
            loaded = load(pretrained_model_name_or_path, *args, **kwargs)
        else:
            loaded = load_published(load, pretrained_model_name_or_path, *args, **kwargs)
        _round_decays(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As transformers'; A_log and dt_bias are written in float32, as exact as the model has them."""
        if state_dict is not None:
            state_dict = with_rests(state_dict, self)
        with whole_decay(self):
            return super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    def post_init(self) -> None:
        """As transformers'; no quantisation converts the gates."""
        super().post_init()
        if getattr(self.config, "quantization_config", None) is not None:
            self._keep_in_fp32_modules = {*(self._keep_in_fp32_modules or ()), *_GATES}

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """As transformers', which would make the gates of a float16 model float32, too."""
        plan: dict[str, torch.dtype] = super()._get_dtype_plan(dtype)
        return {name: wide for name, wide in plan.items() if name not in _GATES}

    def set_solver_steps(self, solver_steps: Sequence[int] | None) -> None:
        """Set the number of solver steps in every GKA layer, and keep solver and tolerance (`set_solver`).

        Args:
            solver_steps: as `GKAConfig.solver_steps`, such as [31], [16, 16] or None.
        """
        self.set_solver(self.config.solver, solver_steps, self.config.tolerance)

    def set_solver(
        self, solver: str, solver_steps: Sequence[int] | None = None, tolerance: float | None = None
    ) -> None:
        """Set the solver of every GKA layer, from the next call on; it is also saved.

        Do not set `model.config.solver` instead: the layers do not read it again. A cache stays valid, because
        states do not depend on the solver.

        Args:
            solver, solver_steps, tolerance: as in `GKAConfig`.

        Raises:
            ValueError: an argument is invalid, or no layer has a solve; the model does not change.
        """
        if "linear_attention" not in self.config.layer_types or self.config.mixer not in OURS:
            raise ValueError("the solver has no effect: no layer of the model is a GKA layer")
        config = copy.copy(self.config)
        config.solver, config.tolerance = solver, tolerance
        config.solver_steps = list(solver_steps) if isinstance(solver_steps, tuple) else solver_steps  # type: ignore[assignment]
        config.check()
        self.config.solver, self.config.tolerance = config.solver, config.tolerance
        self.config.solver_steps = config.solver_steps
        for module in self.modules():
            if isinstance(module, GatedKalmaNet):
                module.set_solver(config.solver, config.solver_steps, config.tolerance)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            std = self.config.initializer_std * getattr(module, "first_factor", 1.0)
            init.normal_(module.weight, mean=0.0, std=std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)  # type: ignore[arg-type]
            pad = getattr(module, "padding_idx", None)
            if pad is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[pad])
        elif isinstance(module, GatedKalmaNet):
            module.reset_parameters()
        else:
            super()._init_weights(module)
        if self.config.mixer not in OURS:
            registered_mixer(self.config.mixer).initialise(module)


def _round_decays(model: nn.Module) -> None:
    """Give A_log and dt_bias of every layer, loaded in float32, the dtype of its other weights (`gka.nn.decay`).

    Not on the meta device, whose weights are read from the disk for every call; but where FSDP will fill them.
    """
    for layer in model.modules():
        if isinstance(layer, GatedKalmaNet):
            weight = layer.o_norm.weight
            if weight.device.type != "meta" or is_fsdp_enabled():
                layer.round_decay(weight.dtype)
