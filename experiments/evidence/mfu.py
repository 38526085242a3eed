"""Floating point operations of a training step, and the peak of a card: MFU = flops / (seconds of a step x peak).

A step counts three times the flops of the forward pass: 2 for each weight of a linear map and token, and those of
the mixer's op. The op of gka counts `gka.ops.flops.forward_flops`, that of attention 2 T H D a token (causal), and
that of Gated DeltaNet 6 H D^2 a token (its recurrence). Nothing that is computed again counts. The solve of gka
counts, so compare mixers by tokens/s, not by MFU.

Legend: B sequences of T tokens, H heads of D dims.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from gka.ops.checks import checked_plan
from gka.ops.flops import forward_flops
from gka.ops.triton.config import CHUNK_SIZES

PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}  # dense bfloat16, NVIDIA's data sheets


def step_flops(model: nn.Module, mixer: str, B: int, T: int, dtype: torch.dtype) -> int:
    """Floating point operations of forward and backward pass of B sequences of T tokens.

    mixer: "gka", "attention" or "Gated DeltaNet"; dtype: of the op's inputs, which decides the solver steps.
    """
    config: Any = model.config
    H, D = config.num_attention_heads, config.head_dim
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    if mixer == "gka":
        q = torch.empty(B, T, H, D, device="meta")
        plan = checked_plan(config.solver, config.solver_steps, config.tolerance, dtype)
        sizes: Any = SimpleNamespace(q=q, v=q, cu_seqlens=None, solver_steps=plan.solver_steps, plan=plan)
        op = forward_flops(sizes, CHUNK_SIZES[-1])
    else:
        op = B * T * (2 * T * H * D if mixer == "attention" else 6 * H * D * D)
    return 3 * (2 * linear * B * T + config.num_hidden_layers * op)


def peak_of(name: str) -> float | None:
    """Peak in bfloat16 of a card by its name; None for a card that is not in PEAKS."""
    found = (peak for card, peak in PEAKS.items() if all(word in name for word in card.split()))
    return next(found, None)
