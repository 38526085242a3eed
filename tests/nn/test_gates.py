"""The gates by kernels: g, beta and alpha, and all gradients, against PyTorch in float64.

They run through Triton's interpreter; test_gpu.py runs them on a GPU.
"""

from __future__ import annotations

import copy

import pytest
import torch
from gate_helpers import WHICH, GateModule, gate_outcome
from helpers import assert_close
from model_helpers import random_inputs

from gka.nn import gates as layer_gates
from gka.ops.triton import fused
from gka.ops.triton import gates as gate_kernels

B, T, HIDDEN, H = 2, 520, 5, 3  # more blocks of 256 rows than programs, the last partly filled


def outcomes(
    which: tuple[bool, bool, bool], dtype: torch.dtype, padded: bool, stand_in: pytest.MonkeyPatch
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """By kernels, and in float64 with the same weights."""
    torch.manual_seed(0)
    module, x = GateModule(HIDDEN, H, which).to(dtype), random_inputs(B, T, HIDDEN).to(dtype)
    out = gate_outcome(module, x, padded)
    stand_in.setattr(fused, "ENABLED", False)
    return out, gate_outcome(copy.deepcopy(module).double(), x.double(), padded)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("which", WHICH, ids=str)
def test_equal_pytorch_in_float64(
    which: tuple[bool, bool, bool], padded: bool, stand_in: pytest.MonkeyPatch
) -> None:
    calls = []
    stand_in.setattr(layer_gates, "gates", lambda *given: calls.append(1) or gate_kernels.gates(*given))
    assert_close(*outcomes(which, torch.float32, padded, stand_in), 2e-6)
    assert calls == [1]


@pytest.mark.usefixtures("poisoned")
def test_a_projection_without_a_bias(stand_in: pytest.MonkeyPatch) -> None:
    found = []
    for enabled in (True, False):
        stand_in.setattr(fused, "ENABLED", enabled)
        torch.manual_seed(0)
        module = GateModule(HIDDEN, H, (True, True, True))
        module.b_proj.bias = None
        found.append(gate_outcome(module, random_inputs(1, 9, HIDDEN).float(), padded=False))
    assert_close(*found, 1e-6)


def test_in_bfloat16(stand_in: pytest.MonkeyPatch) -> None:
    """The projections are rounded, everything behind them is float32."""
    out, ref = outcomes((True, True, True), torch.bfloat16, True, stand_in)
    assert out["g"].dtype == out["alpha"].dtype == torch.float32
    assert_close(out, ref, 1e-2)


def test_weak_and_strong_decays(stand_in: pytest.MonkeyPatch) -> None:
    """softplus from 1e-9 to 50; each value for itself is exact."""
    raw = torch.linspace(-20, 50, 300).view(1, 100, 3)
    vectors = torch.zeros(2, 3)
    g, beta, alpha = gate_kernels.gates(raw, vectors, None, (True, False, False))
    assert beta is None and alpha is None
    exact = -torch.nn.functional.softplus(raw.double(), threshold=1000)
    assert ((g - exact) / exact).abs().max() < 1e-6


def test_operator_is_what_it_says(stand_in: pytest.MonkeyPatch) -> None:
    raw, vectors = random_inputs(2, 7, 9).float().requires_grad_(), random_inputs(4, 3).float().requires_grad_()
    real = torch.arange(14).view(2, 7) < 9
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    arguments = (raw, vectors, real, True, True, True)
    torch.library.opcheck(gate_kernels._function.operator, arguments, test_utils=checks)


def test_gradients_of_gradients(stand_in: pytest.MonkeyPatch) -> None:
    found = []
    for enabled in (True, False):
        stand_in.setattr(fused, "ENABLED", enabled)
        torch.manual_seed(0)
        module, x = GateModule(HIDDEN, H, (True, True, True)), random_inputs(1, 9, HIDDEN).float()
        leaves = [x.requires_grad_(), *module.parameters()]
        values = module(x, torch.arange(9).view(1, 9) < 7)
        first = torch.autograd.grad(sum(y.sin().sum() for y in values), leaves, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)
        found.append(dict(enumerate((*first, *second))))
    assert_close(*found, 1e-5)
