"""The op and the ops to compare with, as functions to time, with and without gradients.

Legend: B batch, T time, H heads, D key dim, V value dim.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from experiments.evidence.timing import seconds
from gka.ops import gated_kalmanet
from gka.ops.plan import SolverName

Inputs = dict[str, Tensor]


def make_inputs(T: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Inputs of the op at batch 1 with requires_grad: q and k (normalised), v, g, alpha, beta."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, T, H, D, device=device) for _ in range(3))
    gates = [torch.randn(1, T, H, device=device) for _ in range(3)]
    inputs = {
        "q": torch.nn.functional.normalize(q, dim=-1).to(dtype),
        "k": torch.nn.functional.normalize(k, dim=-1).to(dtype),
        "v": v.to(dtype),
        "g": torch.nn.functional.logsigmoid(gates[0] + 4),
        "alpha": torch.sigmoid(gates[1]),
        "beta": torch.sigmoid(gates[2]),
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def forward(inputs: Inputs, solver_steps: tuple[int, ...] | None, solver: SolverName = "chebyshev") -> Tensor:
    return gated_kalmanet(*inputs.values(), solver=solver, solver_steps=solver_steps)[0]


def attention(inputs: Inputs) -> Tensor:
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def gated_delta_net(inputs: Inputs) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    names = ("q", "k", "v")
    o: Tensor = chunk_gated_delta_rule(*(inputs[n] for n in names), g=inputs["g"], beta=inputs["beta"])[0]
    return o


def simple_gla(inputs: Inputs) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    o: Tensor = chunk_simple_gla(inputs["q"], inputs["k"], inputs["v"], g=inputs["g"])[0]
    return o


def fla_is_missing(device: torch.device) -> str:
    """The reason why ops of flash-linear-attention cannot be measured; "" if they can."""
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    return "" if device.type == "cuda" else "flash-linear-attention needs a GPU"


def allow_fla_backward() -> str:
    """Disable the check of the Triton version in flash-linear-attention; return a note for the results, or "".

    On Hopper, flash-linear-attention refuses gated backward passes with Triton before 3.7.1, because the compiled
    code gives wrong numbers. Here only the time matters.
    """
    from fla.ops.common import chunk_o

    if chunk_o.TRITON_ABOVE_3_7_1:
        return ""
    chunk_o.TRITON_ABOVE_3_7_1 = True
    return "its check of Triton's version is passed over, for the time alone"


def op_peers(device: torch.device) -> tuple[dict[str, Callable[[Inputs], Tensor]], str]:
    """The ops to compare with by name, and a note on those of flash-linear-attention."""
    peers: dict[str, Callable[[Inputs], Tensor]] = {"SDPA, causal": attention}
    missing = fla_is_missing(device)
    if missing:
        print(f"{missing}: its ops are not measured")
        return peers, ""
    return peers | {"Gated DeltaNet": gated_delta_net, "simple GLA": simple_gla}, allow_fla_backward()


def without_gradients(function: Callable[..., Tensor], *arguments: Any) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return function(*arguments)

    return call


def with_gradients(function: Callable[..., Tensor], inputs: Inputs, *arguments: Any) -> Callable[[], object]:
    def call() -> object:
        o = function(inputs, *arguments)
        return torch.autograd.grad(o, list(inputs.values()), torch.ones_like(o), allow_unused=True)

    return call


def first_calls(functions: dict[str, Callable[[], object]], device: torch.device) -> dict[str, dict[str, Any]]:
    """For each function the seconds of the first call, with compilation, and the peak bytes of the second."""
    found: dict[str, dict[str, Any]] = {}
    for name, function in functions.items():
        found[name] = {"first call": seconds(function, device), "peak bytes": None}
        print(f"        {name:24s} first call {found[name]['first call']:6.1f} s", flush=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function()
            found[name]["peak bytes"] = torch.cuda.max_memory_allocated() - before
    return found


def gpu_seconds(function: Callable[[], object]) -> dict[str, float]:
    """Seconds on the GPU by name of the kernel, from one profiled call."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            found[event.name] = found.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e6
    return found
