"""Time of the gated norm of the layer, compared with other implementations.

    python -m benchmarks.bench_norm --device cuda             # takes less than a minute
    python -m benchmarks.bench_norm --device cuda --sweep     # also with other sizes of the programs
    python -m benchmarks.bench_norm --shapes 40,24 --dtype float32   # a quick run on a CPU

It measures forward, and forward + backward with the gradients of x, gate and weight, for

    gka                 `GatedRMSNorm` with the kernels of this library, on a GPU
    PyTorch             the same in PyTorch
    FusedRMSNormGated   the norm of flash-linear-attention, if it is installed and the device is a GPU
    sum                 forward only: x + gate, which reads and writes as many bytes

A time is the time of many calls in a row, divided by their number. If the GPU is faster than Python, it is the
time of Python. Bytes are the bytes that must be read and written: x, gate and y; in the backward pass also x, gate
and three gradients.

Legend: N rows of V numbers.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.calls import fla_is_missing
from benchmarks.common import medians, write_result
from gka.nn.gated_norm import GatedRMSNorm
from gka.ops.triton import fused
from gka.ops.triton import norm as norm_kernels

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PEER = "FusedRMSNormGated"
TENSORS = {"forward": 3, "forward+backward": 8}  # of N V numbers, read or written
NUMBERS, PROGRAMS = (512, 1024, 2048), (528, 792, 1056)  # of --sweep
Way = tuple[Callable[..., Tensor], Callable[[], AbstractContextManager[Any]]]


def peer(V: int, device: torch.device) -> tuple[nn.Module | None, str]:
    """The norm of flash-linear-attention, or the reason why it is missing."""
    missing = fla_is_missing(device)
    if missing:
        return None, missing
    try:
        from fla.modules import FusedRMSNormGated
    except Exception as error:  # the import of some versions may raise other errors
        return None, f"flash-linear-attention does not fit ({error!r})"
    return FusedRMSNormGated(V, eps=1e-6, activation="swish"), ""


def sizes(numbers: int, programs: int) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.multiple(norm_kernels, FORWARD=numbers, BACKWARD=numbers, PROGRAMS=programs)


def ways(V: int, options: argparse.Namespace) -> tuple[dict[str, Way], str]:
    """Norms by name with the context for their calls; and the reason if the peer is missing."""
    ours = GatedRMSNorm(V, 1e-6).to(options.device, DTYPES[options.dtype])
    found: dict[str, Way] = {}
    if fused.enabled(ours.weight):
        found["gka"] = ours, nullcontext
        if options.sweep:
            for numbers, programs in itertools.product(NUMBERS, PROGRAMS):
                found[f"gka, {numbers} numbers, {programs} programs"] = ours, sizes(numbers, programs)
    found["PyTorch"] = ours, lambda: mock.patch.object(fused, "ENABLED", False)
    theirs, missing = peer(V, options.device)
    if theirs is not None:
        found[PEER] = theirs.to(options.device, DTYPES[options.dtype]), nullcontext
    return found | {"sum": (torch.add, nullcontext)}, missing


def timed(way: Way, x: Tensor, gate: Tensor, dy: Tensor | None, calls: int) -> Callable[[], None]:
    """A function that calls a norm `calls` times; with dy it also runs the backward pass."""
    norm, surroundings = way
    leaves = [x, gate, *(norm.parameters() if isinstance(norm, nn.Module) else ())]

    def run() -> None:
        with surroundings(), torch.set_grad_enabled(dy is not None):
            for _ in range(calls):
                y = norm(x, gate)
                if dy is not None:
                    torch.autograd.grad(y, leaves, dy)

    return run


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for N, V in options.shapes:
        torch.manual_seed(0)
        x, gate, dy = (torch.randn(1, N, V, device=options.device, dtype=DTYPES[options.dtype]) for _ in range(3))
        measured, missing = ways(V, options)
        shape = {"N": N, "V": V, "dtype": options.dtype}
        for what, tensors in TENSORS.items():
            backward = what != "forward"
            functions = {
                name: timed(
                    way,
                    x.requires_grad_(backward),
                    gate.requires_grad_(backward),
                    dy if backward else None,
                    options.calls,
                )
                for name, way in measured.items()
                if not (backward and name == "sum")
            }
            times = medians(functions, options.device, options.repeats)
            if missing:
                print(f"{missing}: {PEER} is not measured")
                yield {"part": "norm", "what": what, "norm": PEER, **shape, "seconds": None, "note": missing}
            for name, time in times.items():
                seconds = {key: value / options.calls for key, value in time.items()}
                ratio = time["median"] / times[PEER]["median"] if PEER in times else None
                speed = tensors * x.nbytes / seconds["median"]
                yield {
                    "part": "norm", "what": what, "norm": name, **shape,
                    "seconds": seconds, "ratio": ratio, "bytes per second": speed,
                }  # fmt: skip
                beside = "" if ratio is None else f"  {ratio:.3f} of {PEER}"
                print(
                    f"N {N:8d} V {V:4d} {what:17s} {name:36s} {seconds['median'] * 1e6:9.1f} us  "
                    f"{speed / 1e12:.2f} TB/s{beside}",
                    flush=True,
                )


def shape(text: str) -> tuple[int, int]:
    N, V = map(int, text.split(","))
    return N, V


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_norm", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="device; default cpu")
    parser.add_argument(
        "--shapes", type=shape, nargs="+", metavar="N,V",
        default=[(131072 * 16, 128), (8 * 2048 * 8, 128), (16, 128)],
        help="rows and V; default 2097152,128 131072,128 16,128; the last is one token with 16 heads",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--sweep", action="store_true", help="also measure other sizes of the programs")
    parser.add_argument("--calls", type=int, default=20, help="number of calls per measured time")
    parser.add_argument("--repeats", type=int, default=20, help="number of measured times; the median counts")
    parser.add_argument("--output", type=Path, help="JSON file; default benchmarks/results/norm_MACHINE_DATE.json")
    options = parser.parse_args()
    command = " ".join(["python -m benchmarks.bench_norm", *sys.argv[1:]])
    write_result("norm", bench(options), command, options.output)


if __name__ == "__main__":
    main()
