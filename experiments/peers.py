"""Other recurrent layers in the place of GKA layers, for comparisons in one and the same model.

    gdn      Gated DeltaNet (arXiv 2412.06464), Qwen3-Next's layer of transformers: its kernels are those of
             flash-linear-attention where that is installed, else PyTorch
    gdn_fla  the same, layer of flash-linear-attention as it is, without a cache; needs an NVIDIA GPU
    mamba2   Mamba-2 (arXiv 2405.21060), transformers' layer: kernels of mamba_ssm where installed, else PyTorch
    mesa     MesaNet (arXiv 2506.05233), layer of flash-linear-attention, with an output gate; needs an NVIDIA GPU

Gated DeltaNet has H heads with keys and values of head_dim D, as a GKA layer has. Mamba-2 has its usual expansion
of 2, so 2 H heads of D where H D is the hidden size, and D numbers of state per channel, with B and C that all
heads share: 2 H D^2 numbers of state, as many as S_kk and S_kv together. MesaNet keeps the same two sums as GKA
and solves with a learned diagonal in place of the adaptive ridge, by up to 30 steps of conjugate gradient.

For Gated DeltaNet, decays and time steps start as those of a GKA layer (`fresh_A_log`, `fresh_dt_bias`, which are
its own authors' too); for Mamba-2 and MesaNet as in their papers. Convolutions start as a GKA layer's.

Importing this module registers them.

Legend: B batch, T time.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import Mamba2Config, Qwen3NextConfig
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from gka.hf import GKAConfig, Mixer, register_mixer
from gka.hf.cache_name import CACHE, NEW
from gka.nn.first_weights import fresh_A_log, fresh_dt_bias

MIXERS = ("gka", "gla", "gdn", "mamba2", "attention")  # attention: softmax attention in every block
GPU_MIXERS = ("mesa",)  # run on an NVIDIA GPU alone
WHOLE_PEERS = ("gdn_fla",)  # the same, for comparisons of speed too
PEER_CACHE = NEW if CACHE == NEW else "cache_params"  # what transformers' layers call a cache
MAMBA_CHUNK = 64  # tokens; shorter than transformers' 256, for scores of [T, chunk, heads] in float32


class Peer(Mixer):
    """A layer of another kind, called as a GKA layer is; `inner` is transformers'."""

    inner: Any

    def __init__(self, config: GKAConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mixer = config.mixer

    @classmethod
    def check(cls, config: GKAConfig) -> None:
        """These layers have no groups of heads."""
        if config.num_key_value_heads != config.num_attention_heads:
            _refuse(config, "num_key_value_heads", "num_attention_heads")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """[B, T, hidden_size] -> the same.

        Args:
            hidden_states: [B, T, hidden_size], any float dtype.
            attention_mask: [B, T], 0 for a pad; pads must stand on the left, where they write nothing.
            past_key_values: the model's cache, brought up to date in place.
            cu_seqlens: None.

        Raises:
            ValueError: packed sequences, which these layers' PyTorch forms cannot keep apart, or a pad that is not
                on the left.
        """
        if cu_seqlens is not None:
            raise ValueError(
                f'a batch is packed, and mixer "{self.mixer}" cannot keep packed sequences apart; '
                "pass the sequences as rows, padded, with an attention_mask"
            )
        if attention_mask is not None:
            if not torch.compiler.is_compiling() and (attention_mask[:, 1:] < attention_mask[:, :-1]).any():
                raise ValueError(
                    f'a pad stands behind a token, and mixer "{self.mixer}" would let it change the state; '
                    "pad on the left"
                )
            attention_mask = attention_mask.to(hidden_states.dtype)
        cache = {} if past_key_values is None else {PEER_CACHE: past_key_values}
        out: Tensor | tuple[Tensor, ...] = self.inner(hidden_states, attention_mask=attention_mask, **cache)
        return out[0] if isinstance(out, tuple) else out  # layers of flash-linear-attention: (o, ...)


class GatedDeltaNet(Peer):
    """Gated DeltaNet."""

    def __init__(self, config: GKAConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        heads, dim = config.num_attention_heads, config.head_dim
        self.inner = Qwen3NextGatedDeltaNet(
            Qwen3NextConfig(
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_hidden_layers,
                linear_num_key_heads=heads,
                linear_num_value_heads=heads,
                linear_key_head_dim=dim,
                linear_value_head_dim=dim,
                linear_conv_kernel_dim=config.conv_size,
                hidden_act="silu",
                rms_norm_eps=config.rms_norm_eps,
                layer_types=["linear_attention"] * config.num_hidden_layers,
            ),
            layer_idx,
        )

    @classmethod
    @torch.no_grad()
    def initialise(cls, module: nn.Module) -> None:
        """The convolution's weight, decays and time steps."""
        if isinstance(module, Qwen3NextGatedDeltaNet):
            init.kaiming_uniform_(module.conv1d.weight, a=math.sqrt(5.0))
            heads, device = module.A_log.shape[0], module.A_log.device
            init.copy_(module.A_log, fresh_A_log(heads, device))
            init.copy_(module.dt_bias, fresh_dt_bias(heads, device))


class Mamba2(Peer):
    """Mamba-2."""

    def __init__(self, config: GKAConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        dim = config.head_dim
        inner = Mamba2Config(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            expand=2,
            num_heads=2 * config.hidden_size // dim,
            head_dim=dim,
            state_size=dim,
            n_groups=1,
            conv_kernel=config.conv_size,
            use_conv_bias=False,
            use_bias=False,
            hidden_act="silu",
            layer_norm_epsilon=config.rms_norm_eps,
            chunk_size=MAMBA_CHUNK,
        )
        self.inner = Mamba2Mixer(inner, layer_idx)

    @classmethod
    def check(cls, config: GKAConfig) -> None:
        """Its heads divide the hidden size."""
        if config.num_attention_heads * config.head_dim != config.hidden_size:
            _refuse(config, "head_dim", "hidden_size / num_attention_heads")
        super().check(config)

    @classmethod
    @torch.no_grad()
    def initialise(cls, module: nn.Module) -> None:
        """The convolution's weight, and the rest as in its paper."""
        if isinstance(module, Mamba2Mixer):
            init.kaiming_uniform_(module.conv1d.weight, a=math.sqrt(5.0))
            module.init_mamba2_weights()


class FlaLayer(Peer):
    """A layer of flash-linear-attention, without a cache, since it fits the caches of that package alone."""

    layer: str

    def __init__(self, config: GKAConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        try:
            layer = getattr(importlib.import_module("fla.layers"), self.layer)
        except ImportError as error:
            raise ImportError(
                f'mixer is "{self.mixer}", a layer of flash-linear-attention, which cannot be imported: {error}; '
                "expected its package, version 0.6, and an NVIDIA GPU"
            ) from None
        self.inner = layer(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            conv_size=config.conv_size,
            norm_eps=config.rms_norm_eps,
            layer_idx=layer_idx,
            **self.options(),
        )

    @classmethod
    def options(cls) -> dict[str, Any]:
        """More arguments of the layer."""
        raise NotImplementedError

    @classmethod
    @torch.no_grad()
    def initialise(cls, module: nn.Module) -> None:
        """The convolutions' weights."""
        if type(module).__name__ == "ShortConvolution":
            init.kaiming_uniform_(module.weight, a=math.sqrt(5.0))  # type: ignore[arg-type]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """As Peer's.

        Raises:
            ValueError: as Peer's, or a cache is given.
        """
        if past_key_values is not None:
            raise ValueError(
                f'past_key_values is given; expected None with mixer "{self.mixer}": pass use_cache=False'
            )
        return super().forward(hidden_states, attention_mask, None, cu_seqlens)


class MesaNet(FlaLayer):
    """MesaNet."""

    layer = "MesaNet"

    @classmethod
    def options(cls) -> dict[str, Any]:
        return {"use_output_gate": True}

    @classmethod
    def check(cls, config: GKAConfig) -> None:
        """Its kernels take heads of up to 128 dims."""
        if config.head_dim > 128:
            _refuse(config, "head_dim", "at most 128")
        super().check(config)

    @classmethod
    @torch.no_grad()
    def initialise(cls, module: nn.Module) -> None:
        """The convolutions' weights, and the ridge: 1 at the start."""
        super().initialise(module)
        if isinstance(ridge := getattr(module, "lambda_params", None), nn.Parameter):
            init.constant_(ridge, math.log(math.expm1(1.0 - module.lambda_lower_bound)))  # type: ignore[operator]


class WholeGatedDeltaNet(FlaLayer):
    """Gated DeltaNet as flash-linear-attention has it, with values of head_dim."""

    layer = "GatedDeltaNet"

    @classmethod
    def options(cls) -> dict[str, Any]:
        return {"expand_v": 1, "use_gate": True, "use_short_conv": True}

    @classmethod
    @torch.no_grad()
    def initialise(cls, module: nn.Module) -> None:
        """The convolutions' weights, decays and time steps."""
        super().initialise(module)
        if type(module).__name__ == "GatedDeltaNet" and isinstance(A_log := module.A_log, nn.Parameter):
            heads, device = A_log.shape[0], A_log.device
            init.copy_(A_log, fresh_A_log(heads, device))
            init.copy_(module.dt_bias, fresh_dt_bias(heads, device))  # type: ignore[arg-type]


def mixer_config(mixer: str, **fields: Any) -> GKAConfig:
    """The configuration of a model of one of the mixers above; fields are GKAConfig's."""
    if mixer != "attention":
        return GKAConfig(mixer=mixer, **fields)
    blocks = fields.get("num_hidden_layers", GKAConfig.num_hidden_layers)
    return GKAConfig(**{"layer_types": ["full_attention"] * blocks, **fields})


def _refuse(config: GKAConfig, name: str, expected: str) -> NoReturn:
    raise ValueError(f"{name} is {getattr(config, name)!r}; expected {expected} with mixer={config.mixer!r}")


register_mixer("gdn", GatedDeltaNet)
register_mixer("mamba2", Mamba2)
register_mixer("mesa", MesaNet)
register_mixer("gdn_fla", WholeGatedDeltaNet)
