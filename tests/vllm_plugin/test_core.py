"""The layer from pools, in mixed steps of decoding and prefill, equals the layer on each request alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from core_helpers import (
    LAYERS,
    REQUESTS,
    ROWS,
    core_layer,
    mixing_of,
    new_pools,
    requests_of,
    served,
    step,
    tokens_of_requests,
)
from helpers import relative_error
from pool_helpers import bits
from reads import Reads

from gka.ops import State, checks
from gka.vllm.core import rehearse

pytestmark = pytest.mark.usefixtures("poisoned")
SLOTS = [slot for slot, _ in REQUESTS]


@pytest.mark.parametrize("kind", LAYERS)
def test_mixed_steps_equal_each_request_alone(kind: str) -> None:
    layer = core_layer(kind, torch.float64)
    xs = tokens_of_requests(layer, torch.float64)
    pools = new_pools(layer, torch.float64)
    ys = served(layer, xs, pools)
    bound = 1e-6 if layer.solver == "cg" else 1e-9  # nine products leave a residual, which rounding changes
    for (slot, _), x, y in zip(REQUESTS, xs, ys, strict=True):
        whole, last = layer(x.unsqueeze(0), return_state=True)
        assert relative_error(y, whole[0]) < bound
        conv = torch.cat([part[0] for part in last.conv if part.shape[2]]).t()
        assert relative_error(pools.conv[slot], conv) < 1e-12
        for pool, part in zip(pools[:2], last.state, strict=True):
            assert (pool is None) == (part is None)
            assert pool is None or relative_error(pool[slot], part[0]) < 1e-9


@pytest.mark.parametrize("kind", ["grouped", "without v convolution"])
def test_mixed_steps_with_the_kernels_of_the_convolutions(kind: str, stand_in: pytest.MonkeyPatch) -> None:
    layer = core_layer(kind, torch.float32)
    xs, pools = tokens_of_requests(layer, torch.float32), new_pools(layer, torch.float32)
    ys = served(layer, xs, pools)
    layer = copy.deepcopy(layer).double()
    for x, y in zip(xs, ys, strict=True):
        assert relative_error(y, layer(x.double().unsqueeze(0))[0]) < 1e-4


def test_rows_of_no_request_stay_as_they_are() -> None:
    layer = core_layer("grouped", torch.float32)
    pools = new_pools(layer, torch.float32)
    before = [bits(pool).clone().view(ROWS, -1) for pool in pools]
    served(layer, tokens_of_requests(layer, torch.float32), pools)
    others = [row for row in range(ROWS) if row not in SLOTS]
    for pool, old in zip(pools, before, strict=True):
        assert torch.equal(bits(pool).view(ROWS, -1)[others], old[others])
        assert pool[SLOTS].isfinite().all()


def test_padding_alone_writes_nothing_and_is_zero() -> None:
    layer = core_layer("without v convolution", torch.float32)
    pools = new_pools(layer, torch.float32)
    before = [bits(pool).clone() for pool in pools]
    x = torch.randn(7, layer.hidden_size)
    y = step(layer, x, pools, requests_of([-1, -1], [(-1, 4, False)]))
    assert torch.equal(y[:2], torch.zeros_like(y[:2])) and y[6:].count_nonzero() == 0
    assert all(torch.equal(bits(pool), old) for pool, old in zip(pools, before, strict=True))


def test_a_decode_step_does_not_depend_on_other_requests() -> None:
    layer = core_layer("grouped", torch.float32)
    together, alone = new_pools(layer, torch.float32), new_pools(layer, torch.float32)
    xs = tokens_of_requests(layer, torch.float32)
    for pools in (together, alone):
        served(layer, xs, pools, padding=False)
    x = torch.randn(len(SLOTS), layer.hidden_size)
    joint = step(layer, x, together, requests_of(SLOTS, []))
    single = [step(layer, x[n : n + 1], alone, requests_of([slot], [])) for n, slot in enumerate(SLOTS)]
    assert relative_error(joint, torch.cat(single)) < 1e-5
    assert relative_error(together.S_kv[SLOTS], alone.S_kv[SLOTS]) < 1e-6


def test_pools_in_bfloat16_round_the_states_alone() -> None:
    """Decays are strong here: e^-1 and below."""
    layer = core_layer("grouped", torch.float32)
    layer.set_decay("A_log", torch.full((layer.num_heads,), 1.0))
    xs = tokens_of_requests(layer, torch.float32)
    wide, narrow = new_pools(layer, torch.float32), new_pools(layer, torch.float32)
    narrow = narrow._replace(S_kk=narrow.S_kk.bfloat16(), S_kv=narrow.S_kv.bfloat16())
    served(layer, xs, wide), served(layer, xs, narrow)
    for pool, ref in zip(State(*narrow[:2]), wide[:2], strict=True):
        assert 1e-5 < relative_error(pool[SLOTS], ref[SLOTS]) < 2e-2


@pytest.mark.parametrize("number", [1, 3, 9])
def test_a_rehearsal_computes_all_tokens_and_writes_nothing(number: int) -> None:
    layer = core_layer("grouped", torch.float64)
    pools = new_pools(layer, torch.float64)
    before = [bits(pool).clone() for pool in pools]
    q, k, v = torch.randn(3, 7, 40, dtype=torch.float64).unbind(0)
    qkv = torch.cat([q, k[:, :20], v[:, :20]], dim=1)
    g, alpha, beta = -torch.rand(7, 4), torch.rand(7, 4), torch.rand(7, 4)
    out = torch.full((7, 4, 10), torch.nan, dtype=torch.float64)
    rehearse(qkv, g, alpha, beta, pools, number, mixing_of(layer), out)
    assert out.isfinite().all() and out.norm() > 0
    assert all(torch.equal(bits(pool), old) for pool, old in zip(pools, before, strict=True))


def test_a_rehearsal_takes_values_that_are_not_finite() -> None:
    """As after softmax attention that computes nothing while memory is measured."""
    layer = core_layer("grouped", torch.float32)
    pools = new_pools(layer, torch.float32)
    before = [bits(pool).clone() for pool in pools]
    qkv, g, alpha, beta = (torch.full(shape, torch.nan) for shape in ((7, 80), (7, 4), (7, 4), (7, 4)))
    out = torch.zeros(7, 4, 10)
    rehearse(qkv, g, alpha, beta, pools, 3, mixing_of(layer), out)
    assert out.isnan().all()
    assert all(torch.equal(bits(pool), old) for pool, old in zip(pools, before, strict=True))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What has been read of tensors so far, on a device where that waits."""
    monkeypatch.delenv("GKA_CHECK_VALUES", raising=False)
    monkeypatch.setattr(checks, "NEVER_WAITING", ())
    with Reads() as watch:
        yield watch.seen


def test_no_step_waits_for_the_device(reads: list[str]) -> None:
    layer = core_layer("grouped", torch.float32)
    pools, x = new_pools(layer, torch.float32), torch.randn(9, layer.hidden_size)
    requests = requests_of([3, 1], [(2, 4, False), (5, 3, False)])
    decodes = requests_of([2, 5], [])
    reads.clear()
    step(layer, x, pools, requests._replace(decodes=0, prefill_tokens=9, cu_seqlens=torch.tensor([0, 4, 9])))
    step(layer, x[:2], pools, decodes)
    assert not reads
