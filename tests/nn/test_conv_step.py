"""One token of the short convolution with its past in a pool, in PyTorch and by the interpreted kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close
from pool_helpers import INDICES, ROWS, assert_conv_step_of_a_pool, bits, conv_step_arguments

from gka.nn.short_conv import ShortConv, short_conv_step
from gka.ops.triton import conv_step, fused

TYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("layout", ["[N, C, W - 1]", "[N, W - 1, C]", "part of the channels"])
@pytest.mark.parametrize(("dtype", "state"), TYPES, ids=str)
def test_pytorch(dtype: torch.dtype, state: torch.dtype, layout: str) -> None:
    assert_conv_step_of_a_pool(short_conv_step, dtype, state, layout, torch.int32)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", ["[N, C, W - 1]", "[N, W - 1, C]", "part of the channels"])
@pytest.mark.parametrize(("dtype", "state"), TYPES, ids=str)
def test_kernel(dtype: torch.dtype, state: torch.dtype, layout: str, stand_in: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    stand_in.setattr(conv_step, "_launch", lambda *given, f=conv_step._launch: calls.append(1) or f(*given))
    assert_conv_step_of_a_pool(short_conv_step, dtype, state, layout, torch.int64)
    assert calls
    stand_in.setattr(fused, "ENABLED", False)
    assert not conv_step.usable(torch.zeros(2, 3), 4)


@pytest.mark.parametrize("width", [2, 4])
def test_steps_equal_the_convolution_of_the_row(width: int) -> None:
    conv = ShortConv(5, width).requires_grad_(False)
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    pool = torch.full((ROWS, 5, width - 1), torch.nan)
    pool[[3, 1]] = 0.0
    rows = torch.tensor([3, 1])
    ys = [short_conv_step(x[:, t], conv.weight.squeeze(1), pool, rows) for t in range(7)]
    assert_close({"y": torch.stack(ys, 1)}, {"y": conv(x)}, 1e-6)


def test_all_rows_are_padding() -> None:
    x, weight, pool, _ = conv_step_arguments(torch.float32, torch.float32, "[N, C, W - 1]", torch.int32)
    before = pool.clone()
    y = short_conv_step(x, weight, pool, torch.full((len(INDICES),), -1))
    assert not y.any() and torch.equal(bits(pool), bits(before))


def test_registration(stand_in: pytest.MonkeyPatch) -> None:
    given = conv_step_arguments(torch.float32, torch.float32, "[N, W - 1, C]", torch.int64)
    torch.library.opcheck(conv_step._conv_step_, given)


def test_one_graph(stand_in: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    x, weight, pool, rows = conv_step_arguments(torch.float32, torch.float32, "[N, W - 1, C]", torch.int64)
    eager = pool.clone()
    y = torch.compile(short_conv_step, fullgraph=True, backend="aot_eager")(x, weight, pool, rows)
    assert torch.equal(y, short_conv_step(x, weight, eager, rows)) and torch.equal(bits(pool), bits(eager))


def test_what_does_not_fit_is_refused() -> None:
    x, weight, pool, rows = conv_step_arguments(torch.float32, torch.float32, "[N, C, W - 1]", torch.int64)
    for given, message in (
        ((x[0], weight, pool, rows), r"x has shape \(\d+,\); expected \[B, C\]"),
        ((x, weight[1:], pool, rows), r"weight has shape .*; expected \[300, W\], W at least 2"),
        ((x, weight, pool[..., 1:], rows), r"pool has shape .*; expected \[N, 300, 3\]"),
        ((x, weight, pool, rows[1:]), r"state_indices has shape \(4,\); expected \[5\]"),
        ((x, weight, pool[:2], rows), r"state_indices has a value of 5; expected less than the pool's 2 rows"),
        ((x, weight.requires_grad_(), pool, rows), r"an argument requires a gradient.*call under torch.no_grad"),
    ):
        with pytest.raises(ValueError, match=message):
            short_conv_step(*given)
