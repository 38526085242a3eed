"""The mixers of the recall experiment, with one head of up to 128 dims and a short convolution of 4 tokens.

    gka-paper    GKA without forget gate, write strength and alpha connection: the layer of figure 3a of the paper
    gka          GKA with its defaults
    linear       linear attention: gka-paper without the solve
    gla          gated linear attention (arXiv 2312.06635), layer of flash-linear-attention
    gdn          Gated DeltaNet (arXiv 2412.06464), layer of flash-linear-attention
    mesa         MesaNet (arXiv 2506.05233), layer of flash-linear-attention: the two states of GKA, another ridge
    delta        DeltaNet (arXiv 2406.06484), layer of flash-linear-attention
    mamba2       Mamba-2 (arXiv 2405.21060): parameters of transformers' layer, the scan in its quadratic form
    attention    softmax attention with dropout 0.1, one head of any width

Keys and values of a head have equal dims everywhere. GLA has a convolution here, an option of its layer: no
recurrent mixer shall fail because it cannot look one token back. Layers of flash-linear-attention need an NVIDIA
GPU.

Legend: B batch, T tokens, D model dim, H heads, N state size of Mamba-2.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from gka.nn import GatedKalmaNet
from gka.training.errors import UserError

from .one_configuration import take_one_configuration
from .recall_model import BLOCKS

WIDEST_HEAD = 128  # what kernels of GKA and of MesaNet take
CONVOLUTION = 4


class RecallMixer(NamedTuple):
    """name: for tables; colour and marker: for pictures; state: numbers of the state per head and (dim of it)^2;
    build: dim and block -> layer.
    """

    name: str
    colour: str
    marker: str
    state: int
    build: Callable[[int, int], nn.Module]


class SoftmaxAttention(nn.Module):
    """Causal softmax attention as in Zoology: one head, biases, dropout 0.1 of the weights, no positions."""

    dropout = 0.1

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, dim=-1))
        dropout = self.dropout if self.training else 0.0
        o = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out_proj(o.squeeze(1))


class Mamba2(Mamba2Mixer):
    """Mamba-2 with expansion 2: transformers' parameters, and its sum over the past as one masked product.

        y_t = sum_{s <= t} (C_t . B_s) exp(sum_{s < r <= t} A dt_r) dt_s x_s + D x_t

    The mask takes [B, H, T, T] numbers: quick for the 64 to 512 tokens of the task. transformers' own way without
    `mamba_ssm` takes N times as much memory.
    """

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[B, T, D] -> [B, T, D]."""
        gate, mixed, dt = self.in_proj(x).split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        mixed = F.silu(self.conv1d(mixed.mT)[..., : x.shape[1]]).mT
        values, B, C = mixed.split([self.intermediate_size, self.ssm_state_size, self.ssm_state_size], dim=-1)
        values = values.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, T, head_dim]
        dt = F.softplus(dt.float() + self.dt_bias).mT  # [B, H, T]
        total = (-self.A_log.float().exp()[:, None] * dt).cumsum(-1)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
        weights = (C @ B.mT).unsqueeze(1) * decay * dt.unsqueeze(-2)
        y = weights.to(values.dtype) @ values + self.D[:, None, None] * values
        y = y.transpose(1, 2).flatten(2)
        return self.out_proj(self.norm(y, gate))  # type: ignore[no-any-return]


def heads(dim: int) -> int:
    """One head, or as many of WIDEST_HEAD dims as the model dim needs."""
    return max(1, dim // WIDEST_HEAD)


def _gka(dim: int, block: int, **switches: bool) -> nn.Module:
    return GatedKalmaNet(dim, heads(dim), conv_size=CONVOLUTION, **switches)  # type: ignore[arg-type]


def _mamba2(dim: int, block: int) -> nn.Module:
    config = Mamba2Config(
        hidden_size=dim,
        num_hidden_layers=BLOCKS,
        expand=2,
        num_heads=2 * heads(dim),
        head_dim=dim // heads(dim),
        state_size=dim // heads(dim),
        n_groups=1,
        conv_kernel=CONVOLUTION,
        use_conv_bias=False,
        use_bias=False,
        hidden_act="silu",
    )
    layer = Mamba2(config, block)
    layer.init_mamba2_weights()
    return layer


def _fla(layer: str, dim: int, block: int, **fields: Any) -> nn.Module:
    try:
        made = getattr(importlib.import_module("fla.layers"), layer)
    except ImportError as error:
        raise UserError(
            f"{layer} is a layer of flash-linear-attention, which cannot be imported: {error}; "
            "expected its package, version 0.6, and an NVIDIA GPU"
        ) from None
    take_one_configuration()
    return made(hidden_size=dim, num_heads=heads(dim), conv_size=CONVOLUTION, layer_idx=block, **fields)  # type: ignore[no-any-return]


def _gla(dim: int, block: int) -> nn.Module:
    return _fla("GatedLinearAttention", dim, block, expand_k=1.0, use_short_conv=True)


def _gdn(dim: int, block: int) -> nn.Module:
    return _fla("GatedDeltaNet", dim, block, head_dim=dim // heads(dim), expand_v=1)


def _mesa(dim: int, block: int) -> nn.Module:
    return _fla("MesaNet", dim, block, head_dim=dim // heads(dim), use_output_gate=True)


_PLAIN = dict(use_forget_gate=False, use_beta_gate=False)
MIXERS = {
    "gka-paper": RecallMixer(
        "GKA, no gates", "#c8553d", "o", 2, partial(_gka, use_alpha_connection=False, **_PLAIN)
    ),
    "gka": RecallMixer("GKA", "#7a1f0f", "P", 2, _gka),
    "gla": RecallMixer("GLA", "#3d7ea6", "s", 1, _gla),
    "gdn": RecallMixer("Gated DeltaNet", "#2a9d8f", "D", 1, _gdn),
    "mesa": RecallMixer("MesaNet", "#7b4f9d", "X", 2, _mesa),
    "mamba2": RecallMixer("Mamba-2", "#b8860b", "v", 2, _mamba2),
    "delta": RecallMixer("DeltaNet", "#6b9e3f", "<", 1, partial(_fla, "DeltaNet", use_gate=True)),
    "linear": RecallMixer("linear attention", "#5b6b8c", ">", 1, partial(_gka, solve=False, **_PLAIN)),
    "attention": RecallMixer("softmax attention", "#8a8a8a", "^", 0, lambda dim, block: SoftmaxAttention(dim)),
}  # fmt: skip


def state_size(mixer: str, dim: int, seq_len: int) -> int:
    """Numbers that one layer keeps of a sequence at its end: its states, or all keys and values."""
    if mixer == "attention":
        return 2 * dim * seq_len
    return MIXERS[mixer].state * dim * (dim // heads(dim))
