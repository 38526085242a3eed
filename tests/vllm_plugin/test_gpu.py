"""The layer from pools on a CUDA device, without vLLM: `make test-gpu`."""

from __future__ import annotations

import copy

import pytest
import torch
from core_helpers import (
    LAYERS,
    REQUESTS,
    ROWS,
    core_layer,
    new_pools,
    requests_of,
    served,
    step,
    tokens_of_requests,
)
from helpers import relative_error
from pool_helpers import bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # as those of the layer


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_mixed_steps_equal_the_cpu_in_float64(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    layer = core_layer(kind, dtype)
    reference = copy.deepcopy(layer).double()
    xs = tokens_of_requests(layer, dtype)
    layer = layer.to(device)
    pools = new_pools(layer, torch.float32)
    ys = served(layer, [x.to(device) for x in xs], pools)
    for (slot, _), x, y in zip(REQUESTS, xs, ys, strict=True):
        whole, last = reference(x.double().unsqueeze(0), return_state=True)
        assert relative_error(y.cpu(), whole[0]) < BOUNDS[dtype]
        for pool, part in zip(pools[:2], last.state, strict=True):
            assert pool is None or relative_error(pool[slot].cpu(), part[0]) < BOUNDS[dtype]


def test_rows_of_no_request_stay_as_they_are(device: torch.device) -> None:
    layer = core_layer("grouped", torch.bfloat16, device)
    pools = new_pools(layer, torch.float32)
    before = [bits(pool).clone().view(ROWS, -1) for pool in pools]
    served(layer, tokens_of_requests(layer, torch.bfloat16, device), pools)
    others = [row for row in range(ROWS) if row not in [slot for slot, _ in REQUESTS]]
    for pool, old in zip(pools, before, strict=True):
        assert torch.equal(bits(pool).view(ROWS, -1)[others], old[others])


def test_no_step_waits_for_the_device(device: torch.device) -> None:
    layer = core_layer("grouped", torch.bfloat16, device)
    pools = new_pools(layer, torch.float32)
    x = torch.randn(12, layer.hidden_size, device=device, dtype=torch.bfloat16)
    mixed = requests_of([3, -1, 1], [(2, 4, False), (-1, 2, False), (5, 3, False)], device)
    for row in (1, 3):  # of requests that decode
        for pool in pools:
            pool[row] = 0
    step(layer, x, pools, mixed)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = step(layer, x, pools, mixed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert y.isfinite().all()


def test_captured_decode_steps_read_the_slots_of_each_replay(device: torch.device) -> None:
    """As in vLLM's CUDA graphs: four rows, of which some have no request, and slots that change."""
    layer = core_layer("grouped", torch.bfloat16, device)
    pools = new_pools(layer, torch.float32)
    xs = tokens_of_requests(layer, torch.bfloat16, device)
    served(layer, xs, pools)
    captured = pools._replace(S_kk=pools.S_kk.clone(), S_kv=pools.S_kv.clone(), conv=pools.conv.clone())
    slots = torch.full((4,), -1, dtype=torch.int32, device=device)
    x = torch.zeros(4, layer.hidden_size, device=device, dtype=torch.bfloat16)
    requests = requests_of([-1] * 4, [], device)._replace(decode_slots=slots)
    step(layer, x, captured, requests)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(layer, x, captured, requests)
    for now in ([4, 2, 7, -1], [2, 8, -1, -1], [5, 7, 8, 4]):
        slots.copy_(torch.tensor(now))
        x.normal_()
        graph.replay()
        direct = step(layer, x, pools, requests_of(now, [], device))
        assert torch.equal(y, direct)
    for pool, ref in zip(captured, pools, strict=True):
        rows = [slot for slot, _ in REQUESTS]
        assert torch.equal(pool[rows], ref[rows])
