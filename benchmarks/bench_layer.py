"""Time and memory of the layer, compared with other layers.

    python -m benchmarks.bench_layer --device cuda      # about 8 minutes on one H200, half of them for autotuning
    python -m benchmarks.bench_layer --device cuda --shapes 8,2048 --hidden 1024 --heads 8 --autocast   # host time
    python -m benchmarks.bench_layer --shapes 1,256 --hidden 64 --heads 2 --head-dim 32 --dtype float32

It measures forward, and forward + backward with the gradients of the input and of all parameters, for

    gka (16, 16), gka (16, 8)   GatedKalmaNet
    Gated DeltaNet              the layer of flash-linear-attention, if it is installed and the device is a GPU
    SDPA                        causal softmax attention between projections of the same size

On a GPU the host time is that of a call that does not wait for the GPU: the time to queue its kernels. With
--autocast the parameters are float32, and the call runs under autocast in bfloat16.

The results also have the time of the first call (with compilation and autotuning) and the peak memory above
parameters and input. On a GPU the time of GatedKalmaNet is divided into the op, matrix products, convolution,
gates, norm and the rest, by the names of the kernels.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gka
from benchmarks.calls import allow_fla_backward, first_calls, fla_is_missing, gpu_seconds
from benchmarks.common import medians, write_result

Call = Callable[[], object]
HOST_REPEATS = 20
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# The first pattern that occurs in the name of a kernel decides its part.
PARTS = {
    "matrix products": r"gemm|nvjet|cutlass|cublas|splitk",
    "convolution": r"conv",
    "gates": r"gate_values|gate_gradients",
    "norm": r"gated_norm|layer_norm|rms_norm|rmsnorm",
}


class SoftmaxAttention(nn.Module):
    """x -> W_o softmax(Q K^T) V, causal."""

    def __init__(self, hidden: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden, heads * head_dim, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (linear(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for linear in projections)
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(o.transpose(1, 2).flatten(2))
        return out


class DeltaNet(nn.Module):
    """Gated DeltaNet of flash-linear-attention, with its first output only."""

    def __init__(self, hidden: int, heads: int, head_dim: int) -> None:
        super().__init__()
        from fla.layers import GatedDeltaNet

        self.layer = GatedDeltaNet(
            hidden_size=hidden, num_heads=heads, head_dim=head_dim, expand_v=1, use_gate=True, use_short_conv=True
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)[0]
        return out


def our_layer(options: argparse.Namespace, solver_steps: tuple[int, ...]) -> nn.Module:
    config = gka.GKAConfig(
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        head_dim=options.head_dim,
        solver_steps=list(solver_steps),
    )
    return gka.GatedKalmaNet.from_config(config)


def layers(options: argparse.Namespace) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Layers by name, with the notes for their results."""
    torch.manual_seed(0)
    size = (options.hidden, options.heads, options.head_dim)
    found: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    for solver_steps in ((16, 16), (16, 8)):
        found[f"gka {solver_steps}"] = our_layer(options, solver_steps), {}
    missing = fla_is_missing(options.device)
    if missing:
        print(f"{missing}: Gated DeltaNet is not measured")
    else:
        note = allow_fla_backward()
        found["Gated DeltaNet"] = DeltaNet(*size), {"note": note} if note else {}
    found["SDPA"] = SoftmaxAttention(*size), {}
    for layer, _ in found.values():
        layer.to(options.device, DTYPES[options.dtype])
    return found


def call(layer: nn.Module, x: Tensor, cotangent: Tensor | None, autocast: bool) -> Call:
    """A call of the layer on x; with a cotangent also of its backward pass."""
    leaves = [x, *layer.parameters()]

    def run() -> object:
        narrow = torch.autocast(x.device.type, torch.bfloat16, enabled=autocast)
        with torch.set_grad_enabled(cotangent is not None), narrow:
            y = layer(x)
        return y if cotangent is None else torch.autograd.grad(y, leaves, cotangent)

    return run


def host_seconds(functions: dict[str, Call], repeats: int) -> dict[str, float]:
    """Median seconds until a call on a GPU returns, which has nothing else to do; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def part_of(kernel: str, ours: set[str]) -> str:
    """The part of the GKA layer that a kernel belongs to; `ours` are the names of the kernels of the op."""
    if kernel in ours:
        return "op"
    return next((part for part, names in PARTS.items() if re.search(names, kernel, re.IGNORECASE)), "rest")


def our_kernels() -> set[str]:
    """Names of all kernels of the op in gka.ops.triton.kernels, and of the functions that they call."""
    import triton

    import gka.ops.triton.kernels

    kinds = (triton.JITFunction, triton.runtime.KernelInterface)
    around = ("conv", "gates", "norm")
    modules = pkgutil.iter_modules(gka.ops.triton.kernels.__path__)
    names = (module.name for module in modules if module.name not in around)
    found = [importlib.import_module(f"gka.ops.triton.kernels.{name}") for name in names]
    return {name for module in found for name, value in vars(module).items() if isinstance(value, kinds)}


def shares(function: Call) -> dict[str, float]:
    """Seconds on the GPU for every part, from one profiled call."""
    ours, found = our_kernels(), dict.fromkeys(("op", *PARTS, "rest"), 0.0)
    for name, spent in gpu_seconds(function).items():
        found[part_of(name, ours)] += spent
    return found


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for B, T in options.shapes:
        size = {"B": B, "T": T, "hidden": options.hidden, "H": options.heads, "D": options.head_dim}
        x = torch.randn(B, T, options.hidden, device=options.device, dtype=DTYPES[options.dtype])
        cotangent = torch.randn_like(x, dtype=torch.bfloat16 if options.autocast else None)
        x.requires_grad_()
        measured = layers(options)
        for what, given in (("forward", None), ("forward+backward", cotangent)):
            calls = {name: call(layer, x, given, options.autocast) for name, (layer, _) in measured.items()}
            first = first_calls(calls, options.device)
            times = medians(calls, options.device, options.repeats)
            host = host_seconds(calls, HOST_REPEATS) if options.device.type == "cuda" else {}
            for name, spent in times.items():
                row = {"part": "layer", "what": what, "layer": name, **size}
                row["dtype"] = "float32 under autocast" if options.autocast else options.dtype
                row |= {"seconds": spent, **first[name], **measured[name][1]}
                if name in host:
                    row["host seconds"] = host[name]
                if options.device.type == "cuda" and name.startswith("gka"):
                    row["shares"] = shares(calls[name])
                queued = f", host {host[name] * 1e3:7.3f} ms" if name in host else ""
                print(f"B {B} T {T:6d} {what:17s} {name:30s} {spent['median'] * 1e3:9.3f} ms{queued}", flush=True)
                for part, value in row.get("shares", {}).items():
                    print(f"{'':33s}{part:22s} {value * 1e3:9.3f} ms", flush=True)
                yield row


def shape(text: str) -> tuple[int, int]:
    B, T = map(int, text.split(","))
    return B, T


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_layer", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument(
        "--shapes", type=shape, nargs="+", metavar="B,T", default=[(1, 131072), (4, 8192)],
        help="batch size and tokens; default 1,131072 4,8192",
    )  # fmt: skip
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5, help="number of timed calls; the median counts")
    parser.add_argument(
        "--output", type=Path, help="JSON file; default: benchmarks/results/layer_MACHINE_DATE.json"
    )
    parser.add_argument("--autocast", action="store_true", help="float32 parameters under autocast in bfloat16")
    options = parser.parse_args()
    if options.autocast:
        options.dtype = "float32"
    command = " ".join(["python -m benchmarks.bench_layer", *sys.argv[1:]])
    write_result("layer", bench(options), command, options.output)


if __name__ == "__main__":
    main()
