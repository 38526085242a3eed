"""Rows that GPUs share, beside one GPU; `make test-gpu` runs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gpu_helpers import moved, on_two_gpus
from helpers import Case, converted, doubled, make_inputs, relative_error, run
from sharded_op import run_shared

from gka.distributed import ContextParallel, gated_kalmanet
from gka.distributed.sums import span_sums

# Deterministic: an operator that is not raises an error.
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
NARROW = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def context() -> Iterator[ContextParallel]:
    """A group of this process alone, by NCCL."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield ContextParallel(dist.group.WORLD)
    dist.destroy_process_group()


def sums_and_gradients(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in ("k", "v", "g", "beta")}
    found = span_sums(*leaves.values(), normalize_k=True, with_kk=True)
    assert found.S_kk is not None
    outputs = {"log_decay": found.log_decay, "S_kk": found.S_kk, "S_kv": found.S_kv}
    cotangents = [
        torch.linspace(-1, 1, x.numel(), device=x.device).view(x.shape).to(x.dtype) for x in outputs.values()
    ]
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), cotangents)
    return outputs | {f"d{name}": x for name, x in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("dtype", (*NARROW, torch.float32), ids=str)
def test_sums_are_those_of_float64(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of inputs of 16 bits also where PyTorch may use TF32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", dtype in NARROW)
    arguments = converted(make_inputs(Case(lengths=(3001,), H=4, Hk=2, D=64, V=48, normalize_qk=True)), dtype)
    found = sums_and_gradients(moved(arguments, device))
    for name, ref in sums_and_gradients(moved(doubled(arguments), device)).items():
        rounded = 4e-3 if name in ("dk", "dv") and dtype in NARROW else 0.0  # to the dtype of the inputs
        assert relative_error(found[name], ref) < rounded + 3e-5, name


@pytest.mark.parametrize("packed", (False, True))
def test_the_op_is_that_of_one_gpu(packed: bool, context: ContextParallel, device: torch.device) -> None:
    case = Case(lengths=(100, 0, 61) if packed else (161,), D=64, V=64, packed=packed, normalize_qk=True)
    arguments = moved(converted(make_inputs(case), torch.bfloat16), device)
    for name, ref in run(arguments).items():
        assert relative_error(run_shared(arguments, context)[name], ref) < 1e-2, name


def test_nothing_waits_for_the_gpu(context: ContextParallel, device: torch.device) -> None:
    """Forward and backward pass after the first, from o and from the final states."""
    arguments = moved(
        converted(make_inputs(Case(lengths=(100, 61), D=64, V=64, packed=True)), torch.bfloat16), device
    )
    names = ("q", "k", "v", "g", "alpha", "beta")
    leaves = [arguments[name].requires_grad_() for name in names]
    shard = context.shard(161, [0, 100, 161])
    torch.use_deterministic_algorithms(False)  # else PyTorch's own operators may wait
    try:
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            o, final = gated_kalmanet(*leaves, shard=shard, output_final_state=True)
            assert final is not None
            torch.autograd.grad(o.float().sum() + final.S_kv.sum(), leaves)
            shard.gather(o)
            shard.positions(device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_compute_what_one_does() -> None:
    assert "zigzag padding torch.bfloat16" in on_two_gpus("parallel_devices_run")
