"""The kernels around the op: when they are taken, what they give, and that the layer stays what it is.

Our convolution runs through Triton's interpreter. flash-linear-attention's norm runs in tests/ops/test_gpu.py;
here PyTorch stands in for it, with its signature.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from hypothesis import given
from hypothesis import strategies as st
from model_helpers import ROWS, assert_near, layer_outcome, random_inputs, random_tokens, tiny_layer, tiny_model
from torch import Tensor, nn

from gka.nn import gated_norm
from gka.nn.short_conv import ShortConv, last_inputs, packing
from gka.ops.triton import config as triton_config
from gka.ops.triton import conv as conv_kernels
from gka.ops.triton import fused


def norm(**a: Any) -> tuple[Tensor, None, Tensor, Tensor]:
    assert a["activation"] == "swish" and a["is_rms_norm"] and a["bias"] is None
    x, gate = a["x"].double(), a["g"].double()
    scale = (x.square().mean(1) + a["eps"]).rsqrt()
    y = x * scale.unsqueeze(1) * a["weight"].double() * F.silu(gate)
    return y.to(a["x"].dtype), None, scale.float(), a["x"]


def norm_backward(**a: Any) -> tuple[Tensor | None, ...]:
    dy, x, gate, weight = (a[name].double() for name in ("dy", "x", "g", "weight"))
    scale, s = a["rstd"].double().unsqueeze(1), torch.sigmoid(gate)
    unit = x * scale
    dgate = dy * unit * weight * s * (1 + gate * (1 - s))
    dunit = dy * weight * gate * s
    dx = (dunit - unit * (dunit * unit).mean(1, keepdim=True)) * scale
    dweight = (dy * unit * gate * s).sum(0).to(a["weight"].dtype)
    return dx.to(a["x_dtype"]), dgate.to(a["x_dtype"]), dweight, None, None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The CPU in the place of a GPU, PyTorch in the place of the norm's kernels, the interpreter for our own."""
    pytest.importorskip("triton", reason="Triton is made for Linux only")
    if torch.cuda.is_available():
        pytest.skip("with a GPU, test_gpu.py runs the kernels themselves")
    found = gated_norm.Kernels(norm, norm_backward)
    monkeypatch.setattr(fused, "DEVICE", "cpu")
    monkeypatch.setattr(conv_kernels, "SPAN", 8)
    monkeypatch.setattr(gated_norm, "LEAST_TOKENS", 2)
    monkeypatch.setattr(gated_norm, "kernels", lambda: found)
    return monkeypatch


def test_taken_for_several_tokens_of_16_or_32_bits(stand_in: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 3, 4)
    assert all(gated_norm.usable(x.to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert not gated_norm.usable(x.double())
    assert not gated_norm.usable(x[:, :1]) and not gated_norm.usable(x[:0])
    stand_in.setattr(gated_norm, "LEAST_TOKENS", 3)
    assert gated_norm.usable(x) and not gated_norm.usable(x[:, :2])
    assert conv_kernels.usable(x[:, :2], 4) and not conv_kernels.usable(x[:, :1], 4)
    assert conv_kernels.usable(x, 8) and not conv_kernels.usable(x, 9) and not conv_kernels.usable(x[:0], 4)
    stand_in.setattr(fused, "ENABLED", False)
    assert not gated_norm.usable(x) and not conv_kernels.usable(x, 4)


def test_nothing_is_imported_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("looked for the kernels")

    monkeypatch.setattr(gated_norm, "kernels", fail)
    tiny_layer(torch.bfloat16)(random_inputs(2, 9, 36).bfloat16())


def test_not_installed_is_no_error(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gated_norm.kernels.__wrapped__() is None
    assert not recwarn.list


def test_another_version_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "fla", None)  # its import fails
    with pytest.warns(UserWarning, match="does not fit"):
        assert gated_norm.kernels.__wrapped__() is None


@pytest.mark.parametrize("rows", ROWS)
def test_the_layer_stays_the_same(rows: str, stand_in: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for module, name in ((conv_kernels, "short_conv"), (gated_norm, "gated_rms_norm")):
        original = getattr(module, name)
        stand_in.setattr(module, name, lambda *a, f=original, n=name, **k: calls.append(n) or f(*a, **k))
    layer = tiny_layer(torch.float32)
    out = layer_outcome(layer, rows)
    assert calls.count("short_conv") == 3 * calls.count("gated_rms_norm") > 0
    calls.clear()
    stand_in.setattr(fused, "ENABLED", False)
    assert_close(out, layer_outcome(layer, rows), 6e-2 if rows == "autocast" else 2e-4)
    assert not calls


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_as_one_graph(packed: bool, stand_in: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    layer = tiny_layer(torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    options = {"cu_seqlens": torch.tensor([0, 4, 4, 5, 13])} if packed else {}
    x, results = random_inputs(1, 13, 36).float(), []
    for function in (compiled, layer):
        leaf = x.clone().requires_grad_()
        out = function(leaf, **options)
        grads = torch.autograd.grad(out.square().sum(), [leaf, *layer.parameters()])
        results.append(dict(enumerate([out, *grads])))
    assert_close(*results, 1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_operators_are_what_they_say(packed: bool, stand_in: pytest.MonkeyPatch) -> None:
    x, weight = (random_inputs(*shape).float().requires_grad_() for shape in ((1, 9, 5), (5, 4)))
    place = torch.tensor([0, 1, *range(7)], dtype=torch.int32) if packed else None
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(conv_kernels._short_conv, (x, weight, place), test_utils=checks)
    o, gate = (random_inputs(2, 3, 4, 5, seed=s).requires_grad_() for s in (3, 4))
    norm_weight = random_inputs(5, seed=5).requires_grad_()
    torch.library.opcheck(gated_norm._gated_rms_norm, (o, gate, norm_weight, 1e-6), test_utils=checks)


def convolved(conv: ShortConv, given: dict[str, Tensor], edges: list[int] | None) -> dict[str, Tensor]:
    """y, and gradients of everything."""
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    if edges is None:
        y = conv(**leaves)
    else:
        packed = packing(leaves["x"], torch.tensor(edges), conv.kernel_size[0])
        y = conv(leaves["x"], packed=packed)
    wanted = {**leaves, "weight": conv.weight}
    grads = torch.autograd.grad(y, list(wanted.values()), random_inputs(*y.shape, seed=2).to(y.dtype))
    return {"y": y, **dict(zip(wanted, grads, strict=True))}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width, channels, T", [(4, 37, 11), (1, 3, 5), (2, 40, 9), (8, 5, 21), (4, 300, 3)])
@pytest.mark.parametrize("kind", ["rows", "state", "packed"])
def test_convolution_equals_pytorch_in_float64(
    kind: str, width: int, channels: int, T: int, dtype: torch.dtype, stand_in: pytest.MonkeyPatch
) -> None:
    """Sequences end and begin in every part of a span, some of them shorter than the width."""
    torch.manual_seed(0)
    conv = ShortConv(channels, width).to(dtype)
    given = {"x": random_inputs(channels, 1 if kind == "packed" else 2, T).to(dtype).permute(1, 2, 0)}
    if kind == "state":  # in float32, as a cache may hold it
        given["state"] = random_inputs(2, channels, width - 1, seed=1).float()
    edges = [0, 0, 1, T // 2, T // 2 + 1, T - 1, T, T] if kind == "packed" else None
    assert conv_kernels.usable(given["x"], width)
    out = convolved(conv, given, edges)
    stand_in.setattr(fused, "ENABLED", False)
    ref = convolved(conv.double(), {name: x.double() for name, x in given.items()}, edges)
    assert_close(out, ref, 1e-6 if dtype == torch.float32 else 5e-3)


def test_sequences_in_a_pack_do_not_see_each_other(stand_in: pytest.MonkeyPatch) -> None:
    """To the bit, NaN in a neighbour included."""
    conv = ShortConv(5, 4)
    x = random_inputs(1, 12, 5).float()
    alone = convolved(conv, {"x": x[:, 4:9]}, None)
    x[:, :4] = x[:, 9:] = torch.nan
    out = convolved(conv, {"x": x}, [0, 4, 9, 12])
    assert torch.equal(out["y"][:, 4:9], alone["y"]) and out["x"][:, 4:9].isfinite().all()


@pytest.mark.parametrize("with_state", [False, True])
@given(T=st.integers(1, 6), width=st.integers(1, 5), data=st.data())
def test_last_inputs(with_state: bool, T: int, width: int, data: st.DataObject) -> None:
    x = random_inputs(2, T, 3)
    state = random_inputs(2, 3, width - 1, seed=1) if with_state else None
    row = torch.cat([torch.zeros(2, 3, width - 1) if state is None else state, x.transpose(1, 2)], dim=2)
    whole = row[..., row.shape[2] - (width - 1) :]
    assert last_inputs(x, state, width).equal(whole)
    lengths = data.draw(st.lists(st.integers(0, T), min_size=2, max_size=2))
    some = torch.stack([row[n, :, length : length + width - 1] for n, length in enumerate(lengths)])
    assert last_inputs(x, state, width, torch.tensor(lengths)).equal(some)


def test_offloaded_and_watched_convolutions(stand_in: pytest.MonkeyPatch) -> None:
    """Modules are called, so hooks run, and weights come from where they are kept."""
    model, tokens = tiny_model(dtype=torch.float32), random_tokens(1, 9)
    with torch.no_grad():
        ref = model(tokens).logits
        seen: list[Tensor] = []
        model.model.layers[0].gka.q_conv1d.register_forward_hook(lambda module, args, out: seen.append(out))
        accelerate.cpu_offload(model, torch.device("cpu"))
        assert model.model.layers[0].gka.k_conv1d.weight.device.type == "meta"
        assert_near(model(tokens).logits, ref, 1e-4)
        assert len(seen) == 1
    with pytest.raises(ValueError, match="weight is on meta; expected cpu"):
        conv_kernels.short_conv(torch.zeros(1, 2, 3), torch.zeros(3, 4, device="meta"))


@pytest.mark.parametrize(
    ("edges", "message"), [([], r"shape \(0,\); expected"), ([[0, 9]], r"\(1, 2\)"), ([-5, 9], "rise from 0")]
)
def test_wrong_sequences_are_refused_before_the_convolutions(
    edges: list[int], message: str, stand_in: pytest.MonkeyPatch
) -> None:
    stand_in.setattr(conv_kernels, "short_conv", None)
    with pytest.raises(ValueError, match=message):
        tiny_layer(torch.float32)(
            random_inputs(1, 9, 36).float(), cu_seqlens=torch.tensor(edges, dtype=torch.int64)
        )


def test_not_for_gpus_without_the_kernels(stand_in: pytest.MonkeyPatch) -> None:
    stand_in.setattr(conv_kernels, "INTERPRETED", False)
    x = torch.zeros(1, 3, 4)
    for runs in (True, False):
        stand_in.setattr(conv_kernels, "runs_kernels", lambda device, runs=runs: runs)
        assert conv_kernels.usable(x, 4) == runs
    stand_in.setattr(torch.version, "cuda", "12.8")
    stand_in.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert triton_config.runs_kernels(0)
    stand_in.setattr(importlib.util, "find_spec", lambda name: None)
    assert not triton_config.runs_kernels(0)


class Adapted(nn.Linear):
    """A projection with something added, as adapters do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[..., : self.out_features]


class Quantised(Tensor):
    """A weight that can do nothing but a product, as those of quantisation libraries."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            plain = [x.as_subclass(Tensor) if isinstance(x, cls) else x for x in args]
            return F.linear(*plain) + args[0][..., :4]
        raise NotImplementedError(function)


@pytest.mark.parametrize("change", ["subclass", "hook", "forward replaced", "weight"])
def test_small_projections_that_are_more_than_a_product_are_called(change: str) -> None:
    layer, x = tiny_layer(), random_inputs(2, 5, 36)
    linear = layer.b_proj
    if change == "subclass":
        layer.b_proj = Adapted(36, 4).double()
        layer.b_proj.load_state_dict(linear.state_dict())
    elif change == "hook":
        linear.register_forward_hook(lambda module, args, out: out + args[0][..., :4])
    elif change == "weight":
        weight = linear.weight.detach()
        del linear._parameters["weight"]
        linear.__dict__["weight"] = weight.as_subclass(Quantised)
    else:
        plain = linear.forward
        linear.forward = lambda x: plain(x) + x[..., :4]
    weight = linear.weight.as_subclass(Tensor) if change != "weight" else weight
    raw = F.linear(x, weight, linear.bias) + x[..., :4]
    assert_near(layer._gates(x, None)[2], torch.sigmoid(raw) + 1e-6, 1e-12)
