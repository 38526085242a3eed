"""The layer by flash-linear-attention's kernels: when they are taken, and that the layer stays what it is.

The kernels themselves run in tests/test_gpu.py. Here PyTorch stands in for them, with their signatures.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from hypothesis import given
from hypothesis import strategies as st
from model_helpers import ROWS, assert_near, layer_outcome, random_inputs, tiny_layer
from torch import Tensor, nn

from gka import fused
from gka.short_conv import ShortConv, last_inputs, short_conv


def conv_rows(a: dict[str, Any]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of every sequence: its tokens, its row [B, W - 1 + length, C] and SiLU's argument, in float64."""
    x, weight, state = a["x"].double(), a["weight"].double(), a["initial_state"]
    edges = [0, x.shape[1]] if a["cu_seqlens"] is None else a["cu_seqlens"].tolist()
    W = weight.shape[1]
    for first, last in itertools.pairwise(edges):
        before = x.new_zeros(x.shape[0], W - 1, x.shape[2])
        if state is not None:  # [B, C, W], of which the first column does not count
            before = state[:, :, 1:].transpose(1, 2).double()
        row = torch.cat([before, x[:, first:last]], dim=1)
        taps = [row[:, j : j + last - first] * weight[:, j] for j in range(W)]
        yield slice(first, last), row, torch.stack(taps).sum(0)


def covered(cu_seqlens: Tensor, table: Tensor, chunk_size: int) -> list[int]:
    """The tokens that the chunks of a table cover, in order."""
    tokens = []
    for number, chunk in table.tolist():
        first, last = cu_seqlens[number : number + 2].tolist()
        tokens += range(first + chunk * chunk_size, min(first + (chunk + 1) * chunk_size, last))
    return tokens


def conv(**a: Any) -> tuple[Tensor, None]:
    assert a["bias"] is None and a["residual"] is None and a["activation"] == "silu"
    if a["cu_seqlens"] is not None:
        covering = covered(a["cu_seqlens"], a["chunk_indices"], a["chunk_size"])
        assert covering == list(range(a["x"].shape[1]))
    y = torch.cat([F.silu(z) for _, _, z in conv_rows(a)], dim=1)
    return y.to(a["x"].dtype), None


def conv_backward(**a: Any) -> tuple[Tensor | None, ...]:
    weight, W = a["weight"].double(), a["weight"].shape[1]
    dx, dweight = torch.zeros_like(a["x"], dtype=torch.float64), torch.zeros_like(weight)
    dstate = None if a["initial_state"] is None else torch.zeros_like(a["initial_state"])
    for tokens, row, z in conv_rows(a):
        dz = a["dy"][:, tokens].double() * torch.sigmoid(z) * (1 + z * (1 - torch.sigmoid(z)))
        drow = torch.zeros_like(row)
        for j in range(W):
            drow[:, j : j + z.shape[1]] += dz * weight[:, j]
            dweight[:, j] += (dz * row[:, j : j + z.shape[1]]).sum((0, 1))
        dx[:, tokens] = drow[:, W - 1 :]
        if dstate is not None:
            dstate[:, :, 1:] = drow[:, : W - 1].transpose(1, 2)
    return dx.to(a["x"].dtype), dweight.to(a["weight"].dtype), None, None, dstate


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
    """The CPU in the place of a GPU, PyTorch in the place of the kernels."""
    found = fused.Kernels(conv, conv_backward, norm, norm_backward)
    monkeypatch.setattr(fused, "DEVICE", "cpu")
    monkeypatch.setattr(fused, "LEAST_TOKENS", 2)
    monkeypatch.setattr(fused, "kernels", lambda: found)
    return monkeypatch


def test_taken_for_several_tokens_of_16_or_32_bits(stand_in: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 3, 4)
    assert all(fused.usable(x.to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert not fused.usable(x.double())
    assert not fused.usable(x[:, :1]) and not fused.usable(x[:0])
    long = torch.zeros(1, 1).expand(1, 64 * 65535).unsqueeze(2)
    assert fused.usable(long) and not fused.usable(long, sequences=1)
    stand_in.setattr(fused, "LEAST_TOKENS", 64)
    assert fused.usable(long[:, :64]) and not fused.usable(long[:, :63])
    stand_in.setattr(fused, "ENABLED", False)
    assert not fused.usable(x)


def test_nothing_is_imported_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("looked for the kernels")

    monkeypatch.setattr(fused, "kernels", fail)
    tiny_layer(torch.bfloat16)(random_inputs(2, 9, 36).bfloat16())


def test_not_installed_is_no_error(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fused.kernels.__wrapped__() is None
    assert not recwarn.list


def test_another_version_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "fla", None)  # its import fails
    with pytest.warns(UserWarning, match="does not fit"):
        assert fused.kernels.__wrapped__() is None


@given(lengths=st.lists(st.integers(0, 200), min_size=1, max_size=6))
def test_chunks_of_packed_sequences(lengths: list[int]) -> None:
    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    chunks = fused.Chunks.of(edges, sum(lengths))
    assert covered(edges, chunks.table, fused.CHUNK) == list(range(sum(lengths)))
    assert chunks.table.shape == (-(-sum(lengths) // fused.CHUNK) + len(lengths), 2)


@pytest.mark.parametrize("rows", ROWS)
def test_the_layer_stays_the_same(rows: str, stand_in: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("short_conv", "gated_rms_norm"):
        original = getattr(fused, name)
        stand_in.setattr(fused, name, lambda *a, f=original, n=name, **k: calls.append(n) or f(*a, **k))
    stand_in.setattr(fused, "DTYPES", (*fused.DTYPES, torch.float64))  # what stands in takes that, too
    layer = tiny_layer(torch.float32 if rows == "autocast" else torch.float64)
    out = layer_outcome(layer, rows)
    assert calls.count("short_conv") == 3 * calls.count("gated_rms_norm") > 0
    calls.clear()
    stand_in.setattr(fused, "ENABLED", False)
    assert_close(out, layer_outcome(layer, rows), 6e-2 if rows == "autocast" else 1e-6)
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


@pytest.mark.parametrize("kind", ["plain", "state", "packed"])
def test_operators_are_what_they_say(kind: str, stand_in: pytest.MonkeyPatch) -> None:
    x, weight = random_inputs(1, 9, 5).requires_grad_(), random_inputs(5, 4, seed=1).requires_grad_()
    state = random_inputs(1, 5, 4, seed=2).requires_grad_() if kind == "state" else None
    chunks = fused.Chunks.of(torch.tensor([0, 2, 9]), 9) if kind == "packed" else (None, None)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(fused._short_conv, (x, weight, state, *chunks), test_utils=checks)
    o, gate = (random_inputs(2, 3, 4, 5, seed=s).requires_grad_() for s in (3, 4))
    norm_weight = random_inputs(5, seed=5).requires_grad_()
    torch.library.opcheck(fused._gated_rms_norm, (o, gate, norm_weight, 1e-6), test_utils=checks)


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


def test_gradient_of_the_convolutions_state(stand_in: pytest.MonkeyPatch) -> None:
    module = ShortConv(5, 4)
    grads = []
    for enabled in (True, False):
        stand_in.setattr(fused, "ENABLED", enabled)
        x, state = random_inputs(2, 7, 5).float(), random_inputs(2, 5, 3, seed=1).float().requires_grad_()
        y = short_conv(module, x, state)
        grads.append(torch.autograd.grad((y * random_inputs(2, 7, 5, seed=2)).sum(), state)[0])
    assert_near(*grads, 1e-5)


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
