"""The gates of the layer: with kernels on a GPU, otherwise in PyTorch.

    g = -exp(A_log) softplus(x W_a + dt_bias)       beta = sigmoid(x W_b + b_b) + 1e-6
                                                    alpha = sigmoid(x W_alpha + b_alpha)

Legend: B batch, T time, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.triton import fused
from ..ops.triton.gates import Gates, gates, gates_in_pytorch
from .projections import are_plain, bias_of, project, project_as_one


def layer_gates(
    x: Tensor,
    projections: tuple[nn.Linear | None, nn.Linear | None, nn.Linear | None],
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    real: Tensor | None,
) -> Gates:
    """g, beta and alpha, [B, T, H] each, in at least 32 bits; None for those without a projection.

    Args:
        x: [B, T, hidden_size].
        projections: those of g, without a bias, of beta and of alpha.
        A_log, dt_bias: [H] each, in at least 32 bits; with a projection of g.
        real: [B, T] of bool, False for padding, where g = 0 and beta = 0; None for no padding.
    """
    given = [linear for linear in projections if linear is not None]
    kernels = x.shape[1] > 1 and x.numel() > 0 and fused.enabled(x) and are_plain(given)
    if not kernels or not given:
        raw_g, raw_beta, raw_alpha = project(x, *projections)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return gates_in_pytorch((raw_g, raw_beta, raw_alpha), A_log, dt_bias, real, wide)
    vectors = [A_log, dt_bias, *(bias_of(linear) for linear in projections[1:] if linear is not None)]
    stacked = torch.stack([vector.float() for vector in vectors if vector is not None])
    return gates(project_as_one(x, given), stacked, real, [linear is not None for linear in projections])
