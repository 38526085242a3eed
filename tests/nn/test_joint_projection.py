"""All projections of one input as one node: values and gradients against F.linear in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from model_helpers import random_inputs
from torch import Tensor, nn

from gka import GatedKalmaNet
from gka.nn.joint_projection import project_jointly
from gka.ops.triton import fused

pytestmark = pytest.mark.usefixtures("stand_in")


def groups_of(dtype: torch.dtype = torch.float32) -> list[list[nn.Linear]]:
    torch.manual_seed(0)
    return [[nn.Linear(7, n).to(dtype) for n in sizes] for sizes in ((6,), (5,), (3, 1, 2))]


def outcome(groups: list[list[nn.Linear]], x: Tensor, jointly: bool) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    weights = [linear.weight for group in groups for linear in group]
    if jointly:
        outs = project_jointly(x, groups)
        assert outs is not None
    else:
        outs = [torch.cat([F.linear(x, linear.weight) for linear in group], dim=2) for group in groups]
    cotangents = [torch.sin(torch.arange(out.numel())).view(out.shape).to(out.dtype) for out in outs]
    found = torch.autograd.grad(outs, [x, *weights], cotangents)
    named = {f"y{n}": out.detach() for n, out in enumerate(outs)}
    return named | {f"d{n}": gradient for n, gradient in enumerate(found)}


def test_equals_float64() -> None:
    x = random_inputs(2, 9, 7)
    out = outcome(groups_of(), x.float(), jointly=True)
    assert_close(out, outcome(groups_of(torch.float64), x.float().double(), jointly=False), 1e-6)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_in_bfloat16(weights: torch.dtype) -> None:
    """Under autocast with float32 weights, or with weights of 16 bits; as F.linear up to its own rounding."""
    x, groups = random_inputs(2, 9, 7).to(weights), groups_of(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        out, ref = (outcome(groups, x, jointly) for jointly in (True, False))
    assert {name: tensor.dtype for name, tensor in out.items()} == {n: t.dtype for n, t in ref.items()}
    assert out["y0"].dtype == torch.bfloat16
    assert_close(out, ref, 4e-3)


def test_gradients_of_gradients() -> None:
    x, groups = random_inputs(1, 3, 7).float().requires_grad_(), groups_of()
    found = []
    for jointly in (True, False):
        outs = project_jointly(x, groups) if jointly else [F.linear(x, group[0].weight) for group in groups]
        assert outs is not None
        squares = (outs[0].square() * outs[1].sum()).sum()
        (dx,) = torch.autograd.grad(squares, x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [x, groups[0][0].weight, groups[1][0].weight]))
    assert_close(dict(enumerate(found[0])), dict(enumerate(found[1])), 1e-5)


def test_a_frozen_weight_and_a_frozen_input_have_no_gradient() -> None:
    groups = groups_of()
    groups[1][0].weight.requires_grad_(False)
    outs = project_jointly(random_inputs(1, 4, 7).float(), groups)
    assert outs is not None
    torch.cat(outs, dim=2).sum().backward()
    assert groups[1][0].weight.grad is None
    expected = random_inputs(1, 4, 7).float().sum((0, 1)).expand(6, 7)
    assert_close({"dW": groups[0][0].weight.grad}, {"dW": expected}, 1e-6)


def test_one_by_one_where_a_projection_is_more_than_its_weight() -> None:
    groups, x = groups_of(), random_inputs(1, 4, 7).float()
    assert project_jointly(x[:, :1], groups) is None
    groups[0][0].register_forward_hook(lambda *_: None)
    assert project_jointly(x, groups) is None


@pytest.mark.parametrize("switch", ["", "use_output_gate", "use_beta_gate", "no gates"])
def test_the_layer_is_the_same(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every projection, without the output gate, with two gates, with none."""
    off = {"use_forget_gate": False, "use_beta_gate": False, "use_alpha_connection": False}
    switches = off if switch == "no gates" else {switch: False} if switch else {}
    torch.manual_seed(0)
    layer, x = GatedKalmaNet(8, 2, head_dim=4, **switches), random_inputs(2, 5, 8).float().requires_grad_()
    found, calls = [], []

    def counted(*arguments: object) -> list[Tensor] | None:
        calls.append(project_jointly(*arguments))  # type: ignore[arg-type]
        return calls[-1]

    for on in (True, False):
        monkeypatch.setattr("gka.nn.layer.project_jointly", counted if on else lambda *_: None)
        out = layer(x)
        gradients = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
        found.append({"out": out, **{str(n): gradient for n, gradient in enumerate(gradients)}})
    assert len(calls) == 1 and calls[0] is not None
    assert_close(*found, 2e-5)


def test_off_a_gpu_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "DEVICE", "cuda")
    assert project_jointly(random_inputs(1, 4, 7).float(), groups_of()) is None
