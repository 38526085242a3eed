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
    mixing_of,
    new_pools,
    projected,
    requests_of,
    served,
    step,
    tokens_of_requests,
)
from helpers import relative_error
from pool_helpers import bits

from gka.vllm.core import Pools, mix_tokens

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
    """As in vLLM's CUDA graphs: four rows, of which some have no request, and slots that change.

    Projections are not captured: a product of cuBLAS may have other bits in a graph.
    """
    layer = core_layer("grouped", torch.bfloat16, device)
    mixing, pools = mixing_of(layer), new_pools(layer, torch.float32)
    served(layer, tokens_of_requests(layer, torch.bfloat16, device), pools)
    captured = new_pools(layer, torch.float32)  # laid out as the others: kernels add in another order if not
    for copied, pool in zip(captured, pools, strict=True):
        copied.copy_(pool)
    slots = torch.full((4,), -1, dtype=torch.int32, device=device)
    inputs = [x.clone() for x in projected(layer, torch.zeros(4, layer.hidden_size, device=device).bfloat16())]
    out = torch.empty(4, layer.num_heads, layer.head_dim, device=device, dtype=torch.bfloat16)
    requests = requests_of([-1] * 4, [], device)._replace(decode_slots=slots)
    mix_tokens(*inputs, captured, requests, mixing, out)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mix_tokens(*inputs, captured, requests, mixing, out)
    for now in ([4, 2, 7, -1], [2, 8, -1, -1], [5, 7, 8, 4]):
        slots.copy_(torch.tensor(now))
        new = projected(layer, torch.randn(4, layer.hidden_size, device=device).bfloat16())
        for old, x in zip(inputs, new, strict=True):
            old.copy_(x)
        graph.replay()
        direct = torch.empty_like(out)
        mix_tokens(*new, pools, requests_of(now, [], device), mixing, direct)
        assert torch.equal(out, direct), now
    rows = [slot for slot, _ in REQUESTS]
    for name, pool, ref in zip(Pools._fields, captured, pools, strict=True):
        assert torch.equal(pool[rows], ref[rows]), name
