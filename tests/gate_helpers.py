"""The gates of a layer as a module of its own, with all their gradients."""

from __future__ import annotations

import torch
from model_helpers import random_inputs
from torch import Tensor, nn

from gka.nn.gates import layer_gates

NAMES = ("g", "beta", "alpha")
WHICH = ((True, True, True), (True, False, False), (False, True, True), (True, False, True))  # of NAMES


class GateModule(nn.Module):
    """Projections and parameters of the gates that there are, with random values."""

    def __init__(self, hidden: int, heads: int, which: tuple[bool, bool, bool]) -> None:
        super().__init__()
        biases = (False, True, True)
        made = (nn.Linear(hidden, heads, bias=bias) if w else None for w, bias in zip(which, biases, strict=True))
        self.a_proj, self.b_proj, self.alpha_proj = made
        self.A_log = nn.Parameter(torch.randn(heads)) if which[0] else None
        self.dt_bias = nn.Parameter(torch.randn(heads) - 3) if which[0] else None

    def forward(self, x: Tensor, real: Tensor | None) -> tuple[Tensor | None, ...]:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        A_log, dt_bias = (None if p is None else p.to(wide) for p in (self.A_log, self.dt_bias))
        return layer_gates(x, (self.a_proj, self.b_proj, self.alpha_proj), A_log, dt_bias, real)


def gate_outcome(module: GateModule, x: Tensor, padded: bool) -> dict[str, Tensor]:
    """The gates of x [B, T, hidden], and gradients of x and of all parameters."""
    leaf = x.detach().clone().requires_grad_()
    last = x.shape[1] // 3 * torch.arange(1, x.shape[0] + 1, device=x.device)
    real = torch.arange(x.shape[1], device=x.device) < last.unsqueeze(1) if padded else None
    out = {name: y for name, y in zip(NAMES, module(leaf, real), strict=True) if y is not None}
    # Of one sign, so that sums over tokens do not cancel.
    cotangents = [random_inputs(*y.shape, seed=3).abs().to(y) for y in out.values()]
    wanted = {"x": leaf, **dict(module.named_parameters())}
    grads = torch.autograd.grad(list(out.values()), list(wanted.values()), cotangents)
    return {**out, **{f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}}
