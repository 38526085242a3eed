"""The layer's gates from their projections: one launch of the kernels of `kernels/gates.py`.

    g = -exp(A_log) softplus(raw_g + dt_bias)       beta = sigmoid(raw_beta + b_beta) + 1e-6
                                                    alpha = sigmoid(raw_alpha + b_alpha)

At padding g = 0 and beta = 0. Each of the three may be absent. The kernels run for tensors on an NVIDIA GPU of
compute capability 8.0 or later; `gka/nn/gates.py` uses PyTorch elsewhere. Sums are made in one order, so equal
calls give equal bits.

Legend: B batch, T time, H heads; G the number of gates, 1 to 3; F the number of vectors A_log, dt_bias, b_beta and
b_alpha.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import gates_config
from .kernel_function import KernelFunction

PROGRAMS = 2 * 132  # at most, of the backward pass

Gates = tuple[Tensor | None, Tensor | None, Tensor | None]  # g, beta, alpha


def gates(raw: Tensor, vectors: Tensor, real: Tensor | None, which: Sequence[bool]) -> Gates:
    """g, beta and alpha, [B, T, H] float32 each; None for those that there are not.

    Args:
        raw: [B, T, G H], their projections without a bias one after the other; not empty, at most 32 bits.
        vectors: [F, H] float32.
        real: [B, T] of bool, False for padding; None for no padding.
        which: whether there are g, beta and alpha.
    """
    found = iter(_function(raw, vectors, real, *which))
    g, beta, alpha = (x if given else None for given, x in zip(which, found, strict=True))
    return g, beta, alpha


def gates_in_pytorch(
    raw: Gates, A_log: Tensor | None, dt_bias: Tensor | None, real: Tensor | None, wide: torch.dtype
) -> Gates:
    """The same from three projections [B, T, H] with their biases, in the dtype `wide`."""
    g, beta, alpha = (None if x is None else x.to(wide) for x in raw)
    if g is not None and A_log is not None and dt_bias is not None:
        g = -torch.exp(A_log) * F.softplus(g + dt_bias)
    if beta is not None:
        beta = torch.sigmoid(beta) + 1e-6  # a global would be an input of a compiled graph
    if alpha is not None:
        alpha = torch.sigmoid(alpha)
    if real is not None:
        one_or_zero = real.unsqueeze(2).to(wide)
        g, beta = (None if x is None else x * one_or_zero for x in (g, beta))
    return g, beta, alpha


def _empty(raw: Tensor, vectors: Tensor, real: Tensor | None, *which: bool) -> tuple[Tensor, ...]:
    shape = (*raw.shape[:2], vectors.shape[1])
    return tuple(raw.new_empty(shape if given else (0,), dtype=torch.float32) for given in which)


def _forward(raw: Tensor, vectors: Tensor, real: Tensor | None, *which: bool) -> tuple[Tensor, ...]:
    from .kernels.gates import gate_values
    from .launch import launch, on_device

    g, beta, alpha = found = _empty(raw, vectors, real, *which)
    (B, T), H = raw.shape[:2], vectors.shape[1]
    config = gates_config(H)
    with on_device(raw.device):
        launch(gate_values, -(-B * T // config["R"]),
            raw_ptr=raw.contiguous(), vectors_ptr=vectors.contiguous(), real_ptr=_bytes(real),
            g_ptr=g, beta_ptr=beta, alpha_ptr=alpha, N=B * T,
            H=H, FORGET=which[0], WRITE=which[1], SOLVE=which[2], MASKED=real is not None, **config,
        )  # fmt: skip
    return found


def _backward(
    dg: Tensor, dbeta: Tensor, dalpha: Tensor, raw: Tensor, vectors: Tensor, real: Tensor | None, *which: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of raw and of the vectors."""
    from .kernels.gates import gate_gradients
    from .launch import launch, on_device

    (B, T), H = raw.shape[:2], vectors.shape[1]
    config = gates_config(H)
    programs = min(PROGRAMS, -(-B * T // config["R"]))
    draw = torch.empty(raw.shape, dtype=raw.dtype, device=raw.device)
    parts = torch.empty(programs, *vectors.shape, dtype=torch.float32, device=raw.device)
    with on_device(raw.device):
        launch(gate_gradients, programs,
            dg_ptr=dg.contiguous(), dbeta_ptr=dbeta.contiguous(), dalpha_ptr=dalpha.contiguous(),
            raw_ptr=raw.contiguous(), vectors_ptr=vectors.contiguous(), real_ptr=_bytes(real),
            draw_ptr=draw, parts_ptr=parts, N=B * T,
            H=H, FORGET=which[0], WRITE=which[1], SOLVE=which[2], MASKED=real is not None, **config,
        )  # fmt: skip
    return draw, parts.sum(0)


def _bytes(real: Tensor | None) -> Tensor | None:
    return None if real is None else real.contiguous().view(torch.int8)


def _in_pytorch(raw: Tensor, vectors: Tensor, real: Tensor | None, *which: bool) -> tuple[Tensor, ...]:
    """`gates` in PyTorch, for derivatives that the kernels do not have; empty for those that there are not."""
    raws = iter(raw.float().unflatten(2, (-1, vectors.shape[1])).unbind(2))
    rows = iter(vectors.unbind(0))
    A_log, dt_bias = (next(rows), next(rows)) if which[0] else (None, None)
    g = next(raws) if which[0] else None
    beta, alpha = (next(raws) + next(rows) if given else None for given in which[1:])
    found = gates_in_pytorch((g, beta, alpha), A_log, dt_bias, real, torch.float32)
    return tuple(raw.new_empty(0) if x is None else x for x in found)


_function = KernelFunction(
    "gates",
    ("Tensor raw", "Tensor vectors", "Tensor? real", "bool forget", "bool write", "bool solve"),
    differentiable=2,
    outputs=3,
    empty=_empty,
    forward=_forward,
    backward=_backward,
    in_pytorch=_in_pytorch,
)
