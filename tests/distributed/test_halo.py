"""The short convolution of a part of a row, with kernels and without, equals that of the whole row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import relative_error
from torch import Tensor

from gka.distributed import ContextParallel, halo
from gka.nn.short_conv import ShortConv, convolve
from gka.ops.triton import conv as conv_kernels


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    """A group of this process. With zigzag it has two segments, and the second needs inputs of the first."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD  # type: ignore[misc]
    dist.destroy_process_group()


def outcome(convs: list[ShortConv | None], xs: list[Tensor], call: Any) -> list[Tensor]:
    """Outputs, and gradients of the inputs and the weights."""
    leaves = [x.detach().requires_grad_() for x in xs]
    ys = call(convs, leaves)
    weights = [conv.weight for conv in convs if conv is not None]
    cotangents = [y.detach().sin() for y in ys]
    return [*ys, *torch.autograd.grad(ys, [*leaves, *weights], cotangents)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("T", (22, 4, 2))
@pytest.mark.parametrize("layout", ("contiguous", "zigzag"))
@pytest.mark.parametrize("width", (4, 2))
@pytest.mark.parametrize("kernels", (True, False))
def test_equals_the_whole_row(
    kernels: bool, width: int, layout: Any, T: int, alone: dist.ProcessGroup, stand_in: pytest.MonkeyPatch
) -> None:
    """Also of segments that are shorter than the convolution."""
    torch.manual_seed(0)
    launched = []
    forward = conv_kernels.launch_forward
    stand_in.setattr(conv_kernels, "launch_forward", lambda *given: launched.append(1) or forward(*given))
    if not kernels:
        stand_in.setattr(conv_kernels, "usable", lambda *_: False)
    convs = [ShortConv(5, width), None, ShortConv(37, width)]
    xs = [torch.randn(2, T, C) for C in (5, 3, 37)]
    shard = ContextParallel(alone, layout).shard(T)
    found = outcome(convs, xs, lambda *given: halo.convolve_part(*given, shard))
    assert bool(launched) == (kernels and T // len(shard.segments) > 1)
    stand_in.setattr(conv_kernels, "usable", lambda *_: False)
    expected = outcome(convs, xs, lambda convs, xs: convolve(convs, xs, [None] * 3, None))
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert all(relative_error(x, y) < 1e-6 for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("kernels", (True, False))
def test_frozen_inputs_send_nothing_back(
    kernels: bool, alone: dist.ProcessGroup, stand_in: pytest.MonkeyPatch
) -> None:
    """With kernels and without: ranks may differ in that, and all must exchange the same."""
    sent = []
    returned = halo.scattered_sum
    stand_in.setattr(halo, "scattered_sum", lambda *given: sent.append(1) or returned(*given))
    if not kernels:
        stand_in.setattr(conv_kernels, "usable", lambda *_: False)
    conv, x = ShortConv(5, 4), torch.randn(1, 8, 5)
    for frozen in (True, False):
        (y,) = halo.convolve_part([conv], [x.requires_grad_(not frozen)], ContextParallel(alone).shard(8))
        y.sum().backward()
        assert len(sent) == (not frozen)
    assert conv.weight.grad is not None
