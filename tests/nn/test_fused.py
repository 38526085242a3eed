"""The kernels around the op: when they are taken, what they give, and that the layer stays what it is.

They run through Triton's interpreter; tests/ops/test_gpu.py runs them on a GPU.
"""

from __future__ import annotations

import importlib.util
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
from torch._subclasses import FakeTensorMode

from gka.nn.gated_norm import GatedRMSNorm
from gka.nn.short_conv import ShortConv, convolve, last_inputs, packing
from gka.ops.triton import config as triton_config
from gka.ops.triton import conv as conv_kernels
from gka.ops.triton import fused, norm


def test_taken_for_16_or_32_bits(stand_in: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 3, 4)
    assert all(norm.usable(x.to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert not norm.usable(x.double()) and not norm.usable(x[:0])
    assert norm.usable(x[:, :1])
    assert conv_kernels.usable(x[:, :2], 4) and not conv_kernels.usable(x[:, :1], 4)
    assert conv_kernels.usable(x, 8) and not conv_kernels.usable(x, 9) and not conv_kernels.usable(x[:0], 4)
    stand_in.setattr(fused, "ENABLED", False)
    assert not norm.usable(x) and not conv_kernels.usable(x, 4)


def test_nothing_is_asked_of_a_gpu_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "INTERPRETED", False)
    monkeypatch.setattr(fused, "runs_kernels", None)
    tiny_layer(torch.bfloat16)(random_inputs(2, 9, 36).bfloat16())


@pytest.mark.parametrize("rows", ROWS)
def test_the_layer_stays_the_same(rows: str, stand_in: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for module, name in ((conv_kernels, "short_convs"), (norm, "gated_rms_norm")):
        original = getattr(module, name)
        stand_in.setattr(module, name, lambda *a, f=original, n=name, **k: calls.append(n) or f(*a, **k))
    layer = tiny_layer(torch.float32)
    out = layer_outcome(layer, rows)
    convolutions = calls.count("gated_rms_norm")
    if rows == "in parts":  # one is of a single token, without a kernel
        convolutions -= 1
    assert calls.count("short_convs") == convolutions > 0
    calls.clear()
    stand_in.setattr(fused, "ENABLED", False)
    # The first tokens of short sequences amplify the rounding of float32: either way is up to 1.7e-4 from float64.
    assert_close(out, layer_outcome(layer, rows), 6e-2 if rows == "autocast" else 5e-4)
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
    for xs, w in (((x, None, None), weight), ((x, None, x.detach()), torch.cat([weight, weight]))):
        front = None if packed else random_inputs(1, 3, w.shape[0], seed=1).float().requires_grad_()
        for before in (None, front):
            given = (*xs, w, before, place)
            torch.library.opcheck(conv_kernels._function.operator, given, test_utils=checks)
            cotangents = [torch.zeros_like(x) if x is not None else torch.zeros(0) for x in xs]
            narrow = [x if x is None else x.detach().bfloat16() for x in (*cotangents, *xs)]
            fixed = [
                x if x is None else x.detach()
                for x in (w, before if packed or before is None else before.bfloat16(), place)
            ]
            torch.library.opcheck(
                conv_kernels._function.backward_operator, (*narrow, *fixed), test_utils="test_faketensor"
            )
    o, gate = (random_inputs(2, 3, 4, 5, seed=s).requires_grad_() for s in (3, 4))
    norm_weight = random_inputs(5, seed=5).requires_grad_()
    torch.library.opcheck(norm._function.operator, (o, gate, norm_weight, 1e-6), test_utils=checks)


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


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("without_v", [False, True], ids=["", "without v"])
def test_one_launch_for_all_convolutions(without_v: bool, packed: bool, stand_in: pytest.MonkeyPatch) -> None:
    """What single calls give, to the bit, for several blocks of channels; a hook makes calls single."""
    launches: list[int] = []
    kernel = conv_kernels.short_convs
    stand_in.setattr(conv_kernels, "short_convs", lambda xs, *o: launches.append(len(xs)) or kernel(xs, *o))
    torch.manual_seed(0)
    convs = [None if without_v and C == 9 else ShortConv(C, 4) for C in (300, 37, 9)]
    xs = [random_inputs(1, 13, C, seed=C).float().requires_grad_() for C in (300, 37, 9)]
    found = []
    for _ in range(2):
        place = packing(xs[0], torch.tensor([0, 5, 5, 13]), 4) if packed else None
        ys = convolve(convs, xs, [None] * 3, place)
        leaves = [*xs, *(conv.weight for conv in convs if conv is not None)]
        found.append([*ys, *torch.autograd.grad([y.sin().sum() for y in ys], leaves)])
        convs[0].register_forward_hook(lambda *_: None)
    assert all(together.equal(single) for together, single in zip(*found, strict=True))
    number = 2 if without_v else 3
    assert launches == [number, *[1] * number]


def test_sequences_in_a_pack_do_not_see_each_other(stand_in: pytest.MonkeyPatch) -> None:
    """To the bit, NaN in a neighbour included."""
    conv = ShortConv(5, 4)
    x = random_inputs(1, 12, 5).float()
    alone = convolved(conv, {"x": x[:, 4:9]}, None)
    x[:, :4] = x[:, 9:] = torch.nan
    out = convolved(conv, {"x": x}, [0, 4, 9, 12])
    assert torch.equal(out["y"][:, 4:9], alone["y"]) and out["x"][:, 4:9].isfinite().all()


def normed(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """y of the module `GatedRMSNorm`, and gradients of x, gate and weight."""
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    module = GatedRMSNorm(given["weight"].shape[0], 1e-5)
    y = torch.func.functional_call(module, {"weight": leaves["weight"]}, (leaves["x"], leaves["gate"]))
    assert y.dtype == given["x"].dtype
    grads = torch.autograd.grad(y, list(leaves.values()), random_inputs(*y.shape, seed=9).to(y.dtype))
    assert all(grad.dtype == given[name].dtype for name, grad in zip(leaves, grads, strict=True))
    return {"y": y, **dict(zip(leaves, grads, strict=True))}


def norm_inputs(rows: int, V: int, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    given = {name: random_inputs(1, rows, V, seed=seed) for seed, name in enumerate(("x", "gate"))}
    given["weight"] = random_inputs(V, seed=2)
    return {name: x.to(dtypes[name]) for name, x in given.items()}


def assert_norm_is_right(given: dict[str, Tensor], stand_in: pytest.MonkeyPatch, bound: float) -> None:
    """Against PyTorch in float64."""
    assert norm.usable(given["x"])
    out = normed(given)
    stand_in.setattr(fused, "ENABLED", False)
    assert_close(out, normed({name: x.double() for name, x in given.items()}), bound)


BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("V", [5, 24, 64, 100, 128, 200, 600])
@pytest.mark.parametrize("rows", [1, 7, 130, 1000])
def test_norm_equals_pytorch_in_float64(
    rows: int, V: int, dtype: torch.dtype, stand_in: pytest.MonkeyPatch
) -> None:
    """Blocks of rows are whole, partly filled, and more than the programs of the backward pass."""
    given = norm_inputs(rows, V, dict.fromkeys(("x", "gate", "weight"), dtype))
    assert_norm_is_right(given, stand_in, BOUNDS[dtype])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("narrow", [("x", "gate"), ("weight",), ("gate",)], ids="+".join)
def test_norm_of_several_dtypes(narrow: tuple[str, ...], stand_in: pytest.MonkeyPatch) -> None:
    """Such as a weight in float32 under autocast."""
    dtypes = {n: torch.bfloat16 if n in narrow else torch.float32 for n in ("x", "gate", "weight")}
    assert_norm_is_right(norm_inputs(7, 24, dtypes), stand_in, BOUNDS[torch.bfloat16])


def test_norm_of_rows_wider_than_a_block_of_them(stand_in: pytest.MonkeyPatch) -> None:
    stand_in.setattr(norm, "FORWARD", 64)
    stand_in.setattr(norm, "BACKWARD", 64)
    assert_norm_is_right(
        norm_inputs(9, 100, dict.fromkeys(("x", "gate", "weight"), torch.float32)), stand_in, 1e-6
    )


def test_norm_of_tensors_that_are_not_contiguous(stand_in: pytest.MonkeyPatch) -> None:
    given = norm_inputs(6, 24, dict.fromkeys(("x", "gate", "weight"), torch.float32))
    x, gate = (given[n].view(2, 3, 24).transpose(0, 1) for n in ("x", "gate"))
    out = norm.gated_rms_norm(x, gate, given["weight"].repeat(2)[::2], 1e-5)
    expected = norm.gated_rms_norm(x.contiguous(), gate.contiguous(), given["weight"].repeat(2)[::2].clone(), 1e-5)
    assert out.equal(expected) and out.shape == x.shape


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("V", [0, 5])
def test_norm_of_nothing(V: int) -> None:
    x, gate, weight = (torch.zeros(*shape, requires_grad=True) for shape in ((0, 3, V), (0, 3, V), (V,)))
    y = norm.gated_rms_norm(x, gate, weight, 1e-5)
    y.sum().backward()
    assert y.shape == x.grad.shape == gate.grad.shape == (0, 3, V) and weight.grad.equal(torch.zeros(V))


def test_norm_of_what_does_not_fit_is_refused() -> None:
    x, weight = torch.zeros(2, 3, 4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\), \(2, 1, 4\) and \(4,\); expected"):
        norm.gated_rms_norm(x, x[:, :1], weight, 1e-5)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) and \(3,\); expected"):
        norm.gated_rms_norm(x, x, weight[:3], 1e-5)
    with pytest.raises(ValueError, match="are on cpu and meta; expected cpu"):
        norm.gated_rms_norm(x, x, weight.to("meta"), 1e-5)


def test_norm_of_fake_tensors() -> None:
    with FakeTensorMode():
        x, weight = torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(4)
        y = norm.gated_rms_norm(x, x, weight, 1e-5)
        assert y.shape == torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("packed", [False, True])
def test_derivatives_beyond_the_kernels(packed: bool, stand_in: pytest.MonkeyPatch) -> None:
    """Gradients of gradients, and forward mode, are those of PyTorch; x is longer than the span of a program."""
    conv, rms = ShortConv(6, 3), GatedRMSNorm(6, 1e-6)
    x, direction = random_inputs(1, 19, 6).float(), random_inputs(1, 19, 6, seed=5).float()

    def function(x: Tensor, taps: Tensor) -> Tensor:
        edges = torch.tensor([0, 2, 11, 19]) if packed else None
        y = torch.func.functional_call(
            conv, {"weight": taps}, (x,), {"packed": None if edges is None else packing(x, edges, 3)}
        )
        return rms(y, x)

    found = []
    for enabled in (True, False):
        stand_in.setattr(fused, "ENABLED", enabled)
        leaves = [x.clone().requires_grad_(), conv.weight.detach().clone().requires_grad_()]
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        tangent = torch.func.jvp(lambda x: function(x, conv.weight.detach()), (x,), (direction,))[1]
        found.append(dict(enumerate((*first, *second, tangent))))
    assert_close(found[0], found[1], 1e-4)


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
        conv_kernels.short_convs([torch.zeros(1, 2, 3)], torch.zeros(3, 4, device="meta"))


@pytest.mark.parametrize(
    ("edges", "message"), [([], r"shape \(0,\); expected"), ([[0, 9]], r"\(1, 2\)"), ([-5, 9], "rise from 0")]
)
def test_wrong_sequences_are_refused_before_the_convolutions(
    edges: list[int], message: str, stand_in: pytest.MonkeyPatch
) -> None:
    stand_in.setattr(conv_kernels, "short_convs", None)
    with pytest.raises(ValueError, match=message):
        tiny_layer(torch.float32)(
            random_inputs(1, 9, 36).float(), cu_seqlens=torch.tensor(edges, dtype=torch.int64)
        )


def test_not_for_gpus_without_the_kernels(stand_in: pytest.MonkeyPatch) -> None:
    stand_in.setattr(fused, "INTERPRETED", False)
    x = torch.zeros(1, 3, 4)
    for runs in (True, False):
        stand_in.setattr(fused, "runs_kernels", lambda device, runs=runs: runs)
        assert conv_kernels.usable(x, 4) == norm.usable(x) == runs
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
