"""Decode steps over a pool of states on a CUDA device: `make test-gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from decode_helpers import StepCase, call_step, copied, reference_step, step_arguments
from helpers import assert_close
from pool_helpers import (
    POOL_CASES,
    ROWS,
    assert_conv_step_of_a_pool,
    assert_step_of_a_pool,
    bits,
    conv_step_arguments,
    state_pool,
)
from torch import Tensor

from gka.nn.short_conv import short_conv_step
from gka.ops import State, gated_kalmanet_step, gather_states, scatter_states_

if torch.cuda.is_available():
    from gka.ops.triton import conv_step
    from gka.ops.triton import step as triton_step

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


@pytest.mark.parametrize("gap", [3, 16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", POOL_CASES, ids=str)
def test_step(case: StepCase, index_dtype: torch.dtype, gap: int, device: torch.device) -> None:
    assert_step_of_a_pool(triton_step.gated_kalmanet_step, case, index_dtype, gap, device)


@pytest.mark.parametrize("layout", ["[N, C, W - 1]", "[N, W - 1, C]", "part of the channels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_conv_step(dtype: torch.dtype, layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    launch = conv_step._launch
    monkeypatch.setattr(conv_step, "_launch", lambda *given: calls.append(1) or launch(*given))
    for index_dtype in (torch.int32, torch.int64):
        assert_conv_step_of_a_pool(short_conv_step, dtype, dtype, layout, index_dtype, device)
    assert calls == [1, 1]


def test_no_part_of_the_pool_is_copied(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public step takes the kernel, and needs memory for o alone."""
    arguments = step_arguments(StepCase(B=5, H=4, Hk=2, D=128, V=128, dtype=torch.bfloat16), device)
    rows = torch.tensor([5, -1, 0, 3, 1], device=device)
    _, pool = state_pool(arguments.pop("state"), rows, gap=16)
    options: dict[str, Any] = {"state": pool, "state_indices": rows, "inplace": True}
    gated_kalmanet_step(**arguments, **options)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o, _ = gated_kalmanet_step(**arguments, **options)
    assert torch.cuda.max_memory_allocated() - before <= o.nbytes + 1024


@pytest.fixture
def as_in_serving(device: torch.device) -> Iterator[None]:
    """Without deterministic algorithms, for which PyTorch's own operators may wait."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_captured_with_other_rows_and_other_padding(
    state: torch.dtype, as_in_serving: None, device: torch.device
) -> None:
    """A CUDA graph of convolution, step, and the reading and writing of a prompt's states."""
    case = StepCase(B=4, H=4, Hk=2, D=128, V=128, dtype=torch.bfloat16, state=state)
    arguments = step_arguments(case, device)
    given = copied(arguments.pop("state"))
    first, second = (
        torch.tensor(rows, dtype=torch.int32, device=device) for rows in ([6, -1, 2, 0], [-1, 1, 5, -1])
    )
    storage, pool = state_pool(given, first, gap=16)
    for part, source in zip(pool, given, strict=True):
        part[[1, 5]] = source[[1, 2]]
    x, weight, conv_pool, _ = conv_step_arguments(
        torch.bfloat16, torch.bfloat16, "[N, W - 1, C]", torch.int32, device
    )
    x = x[:4].nan_to_num()
    conv_pool.copy_(torch.randn(conv_pool.shape, device=device))
    start = (storage.clone(), conv_pool.clone())
    rows, has_initial = first.clone(), torch.tensor([True, True, False, True], device=device)

    def call() -> tuple[Tensor, Tensor]:
        scatter_states_(pool, rows, gather_states(pool, rows, has_initial))
        o, _ = gated_kalmanet_step(**arguments, state=pool, state_indices=rows, inplace=True)
        return o, short_conv_step(x, weight, conv_pool, rows)

    def restart(indices: Tensor) -> None:
        storage.copy_(start[0])
        conv_pool.copy_(start[1])
        rows.copy_(indices)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for indices in (first, second, torch.full_like(first, -1)):
        restart(indices)
        expected = [x.clone() for x in (*call(), storage, conv_pool)]
        restart(indices)
        graph.replay()
        for found, ref in zip((*results, storage, conv_pool), expected, strict=True):
            assert torch.equal(bits(found), bits(ref))
        assert not results[0][indices < 0].any() and results[0][indices >= 0].isfinite().all()


def test_nothing_waits_for_the_device(as_in_serving: None, device: torch.device) -> None:
    arguments = step_arguments(StepCase(B=5), device)
    rows = torch.tensor([5, -1, 0, 3, -7], device=device)
    _, pool = state_pool(arguments.pop("state"), rows, gap=3)
    given = conv_step_arguments(torch.bfloat16, torch.bfloat16, "[N, C, W - 1]", torch.int64, device)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        gated_kalmanet_step(**arguments, state=pool, state_indices=rows, inplace=True)
        short_conv_step(*given)
        scatter_states_(pool, rows, gather_states(pool, rows, rows > 0))


def test_pool_of_more_than_2_31_numbers(device: torch.device) -> None:
    """The last row's address has 64 bits."""
    N, H = 4100, 32
    arguments = step_arguments(StepCase(B=2, H=H, Hk=H, D=128, V=128, state=torch.bfloat16), device)
    expected_o, expected = reference_step(arguments)
    rows = torch.tensor([N - 1, 0], dtype=torch.int32, device=device)
    pool = State(*(torch.zeros(N, H, 128, 128, dtype=torch.bfloat16, device=device) for _ in range(2)))
    scatter_states_(pool, rows, arguments["state"])
    o, _ = call_step(
        triton_step.gated_kalmanet_step, {**arguments, "state": pool}, inplace=True, state_indices=rows
    )
    assert_close({"o": o}, {"o": expected_o}, 1e-5)
    for part, ref in zip(pool, expected, strict=True):
        assert_close({"state": part[rows.long()]}, {"state": ref}, 3e-3)
        assert not part[1 : N - 1].any()


def test_one_graph(device: torch.device) -> None:
    torch._dynamo.reset()
    arguments = step_arguments(StepCase(B=5, D=128, V=128, dtype=torch.bfloat16), device)
    rows = torch.tensor([5, -1, 0, 3, -7], device=device)
    storage, pool = state_pool(arguments.pop("state"), rows, gap=16)
    eager_storage = storage.clone()
    eager = State(*(eager_storage.as_strided(x.shape, x.stride(), x.storage_offset()) for x in pool))
    conv = conv_step_arguments(torch.bfloat16, torch.bfloat16, "[N, W - 1, C]", torch.int64, device)
    eager_conv = conv[2].clone()

    def decode(pool: State, conv_pool: Tensor) -> tuple[Tensor, Tensor]:
        o, _ = gated_kalmanet_step(**arguments, state=pool, state_indices=rows, inplace=True)
        return o, short_conv_step(conv[0], conv[1], conv_pool, conv[3])

    found = torch.compile(decode, fullgraph=True)(pool, conv[2])
    for x, ref in zip(
        (*found, storage, conv[2]), (*decode(eager, eager_conv), eager_storage, eager_conv), strict=True
    ):
        assert torch.equal(bits(x), bits(ref))
    assert len(storage) == ROWS
