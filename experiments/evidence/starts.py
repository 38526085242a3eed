"""Other initial values of the gates of a GKA layer, set on a built model; they are not options of the layer.

alpha = sigmoid(x W_alpha + b)                  b starts at 0, so that alpha starts near 1/2
g     = -exp(A_log) softplus(x W_a + dt_bias)   exp(A_log) starts in [0, 16], softplus(dt_bias) in [0.001, 0.1]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gka.nn.layer import GatedKalmaNet


@dataclass(frozen=True)
class Start:
    """The change; the defaults change nothing.

    Attributes:
        alpha_bias: b of every head; None leaves it.
        rate: factor of exp(A_log).
        step: factor of softplus(dt_bias).
    """

    alpha_bias: float | None = None
    rate: float = 1.0
    step: float = 1.0


@torch.no_grad()
def start_from(model: nn.Module, start: Start) -> nn.Module:
    """Change the initial values of every GKA layer of a model in place; all other weights stay.

    Returns:
        The model.

    Raises:
        ValueError: no layer of the model has the gate that is to start elsewhere.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GatedKalmaNet)]
    if start.alpha_bias is not None:
        if not any(layer.alpha_proj is not None for layer in layers):
            raise ValueError(f"alpha_bias is {start.alpha_bias}; expected None, no layer has an alpha connection")
        for layer in layers:
            if layer.alpha_proj is not None:
                layer.alpha_proj.bias.fill_(start.alpha_bias)
    if (start.rate, start.step) != (1.0, 1.0):
        decaying = [layer for layer in layers if layer.a_proj is not None]
        if not decaying:
            raise ValueError(
                f"rate is {start.rate}, step {start.step}; expected 1, no layer of the model has a forget gate"
            )
        for layer in decaying:
            A_log, dt_bias = (layer.decay_parameter(name, torch.float32) for name in ("A_log", "dt_bias"))
            if start.rate != 1.0:
                layer.set_decay("A_log", A_log + math.log(start.rate))
            if start.step != 1.0:
                layer.set_decay("dt_bias", _softplus_inverse(F.softplus(dt_bias) * start.step))
    return model


def _softplus_inverse(y: Tensor) -> Tensor:
    """x with softplus(x) = y > 0."""
    return y + torch.log(-torch.expm1(-y))
