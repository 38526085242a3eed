"""The layer under transforms and in forward mode, on devices without values, under hooks and checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from gka import GatedKalmaNet
from gka.nn import LayerState

SIZES: dict[str, Any] = dict(num_heads=2, num_kv_heads=1, solver_steps=[64, 64])


def tiny(**options: Any) -> GatedKalmaNet:
    torch.manual_seed(0)
    return GatedKalmaNet(10, **{**SIZES, **options}, dtype=torch.float64)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def calls(layer: GatedKalmaNet, like: Tensor | None = None) -> dict[str, Any]:
    """Functions of x [2, 5, 10]: in rows, padded, packed, with a past, and a decode step."""
    _, past = tiny(layer_idx=None)(tokens(2, 4), return_state=True)
    past = LayerState([x.detach() for x in past.conv], type(past.state)(*(x.detach() for x in past.state)))
    mask, edges = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 1]]), torch.tensor([0, 3, 10])
    if like is not None:
        mask, edges = mask.to(like.device), edges.to(like.device)
        past = LayerState([x.to(like) for x in past.conv], type(past.state)(*(x.to(like) for x in past.state)))
    return {
        "rows": lambda x: layer(x),
        "padded": lambda x: layer(x, attention_mask=mask),
        "packed": lambda x: layer(x.reshape(1, 10, 10), cu_seqlens=edges).reshape(x.shape),
        "past": lambda x: layer(x, state=past),
        "step": lambda x: layer(x[:, :1], state=past),
    }


NAMES = ("rows", "padded", "packed", "past", "step")


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_and_hessians(name: str) -> None:
    function, x = calls(tiny())[name], tokens(2, 5)
    d, step = torch.randn_like(x), 1e-6

    def grad(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(function(leaf).sin().sum(), leaf)[0]

    difference = (function(x + step * d) - function(x - step * d)).detach() / (2 * step)
    assert relative_error(torch.func.jvp(function, (x,), (d,))[1], difference) < 1e-7
    expected, leaf = (grad(x + step * d) - grad(x - step * d)) / (2 * step), x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf).sin().sum(), leaf, create_graph=True)
    assert relative_error(torch.autograd.grad(gradient, leaf, d)[0], expected) < 1e-6
    over = torch.func.jvp(torch.func.grad(lambda x: function(x).sin().sum()), (x,), (d,))[1]
    assert relative_error(over, expected) < 1e-6


def test_gradients_of_every_sample() -> None:
    layer, x = tiny(solver_steps=None), tokens(3, 5)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(layer, weights, (row.unsqueeze(0),)).sin().sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for n in range(3):
        expected = torch.autograd.grad(layer(x[n : n + 1]).sin().sum(), list(layer.parameters()))
        for name, alone in zip(weights, expected, strict=True):
            assert relative_error(found[name][n], alone) < 1e-10, name


@pytest.mark.parametrize("name", NAMES)
def test_shapes_alone(name: str) -> None:
    """The meta device and fake tensors, forward and backward."""
    meta = GatedKalmaNet(10, **SIZES, device="meta", dtype=torch.float64)
    x = tokens(2, 5).to("meta").requires_grad_()
    out = calls(meta, x)[name](x)
    out.sum().backward()
    assert out.is_meta and out.shape == ((2, 1, 10) if name == "step" else x.shape)
    assert x.grad.shape == x.shape and meta.q_proj.weight.grad.shape == (10, 10)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer, fake = GatedKalmaNet(10, **SIZES, dtype=torch.float64), mode.from_tensor(tokens(2, 5))
        fake.requires_grad_()
        fake_out = calls(layer, fake)[name](fake)
        fake_out.sum().backward()
    assert fake_out.shape == out.shape and fake.grad.shape == x.shape


def test_hooks_see_every_submodule() -> None:
    layer, seen = tiny(kv_proj_rank=3), set()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        out = layer(tokens(2, 5))
    finally:
        hook.remove()
    assert {name for name, module in layer.named_modules() if module not in seen} == set()
    assert relative_error(layer(tokens(2, 5)), out) < 1e-13


@pytest.mark.parametrize("name", ["rows", "step"])
def test_checkpointing_in_a_compiled_graph_of_any_length(name: str) -> None:
    torch._dynamo.reset()
    layer = tiny(solver_steps=[2])
    _, past = layer(tokens(2, 4), return_state=True)
    held = [x.detach() for x in (*past.conv, *past.state)]

    def function(x: Tensor, *held: Tensor) -> Tensor:
        if name == "step":
            return checkpoint(lambda x, *h: layer(x, state=(h[:3], h[3:])), x, *held, use_reentrant=False)
        return checkpoint(layer, x, use_reentrant=False)

    compiled = torch.compile(function, dynamic=True, fullgraph=True, backend="eager")
    for T in (1,) if name == "step" else (5, 9):
        found = []
        for call in (compiled, function):
            x = tokens(2, T).requires_grad_()
            found.append(torch.autograd.grad(call(x, *held).sum(), x)[0])
        assert relative_error(*found) < 1e-12
