"""Time and memory of the op, compared with other ops.

    python -m benchmarks.bench_ops                 # growth with T, peer, memory: about 6 minutes on 2 cores
    python -m benchmarks.bench_ops --only growth
    python -m benchmarks.bench_ops --only wide --device cuda   # the paper's width in bfloat16, on a GPU
    python -m benchmarks.bench_ops --only length --device cuda # from 2K to 1M tokens, with a picture

growth: T doubles from 4096 to 65536; the time must double too.
peer:   comparison with the PyTorch code of the gated delta rule in transformers' Qwen3-Next, at the same shape.
memory: peak of forward + backward, each T in a new process, compared with the tensors that must be in memory:
        inputs, output, their gradients, and both states at every chunk.
wide:   the paper's width, D = V = 128, in bfloat16, compared with softmax attention and, if it is installed, with
        Gated DeltaNet and simple GLA of flash-linear-attention. Results: time, first call, peak memory above the
        inputs; on a GPU also the time of each kernel of this library, with a picture.
length: the same width, compared with softmax attention and Gated DeltaNet: forward for T from 2048 to a million,
        forward + backward up to 262144. It writes a separate file, length_MACHINE_DATE.json, and a picture.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks import stages
from benchmarks.bench_length import bench_length, plot
from benchmarks.calls import (
    Inputs,
    first_calls,
    forward,
    make_inputs,
    op_peers,
    with_gradients,
    without_gradients,
)
from benchmarks.common import medians, write_result
from gka.ops.torch.chunked import default_chunk_size


def delta_rule(inputs: Inputs) -> Tensor:
    """The gated delta rule of Qwen3-Next in transformers, in PyTorch."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    q, k, v, g, _, beta = inputs.values()
    o: Tensor = torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta)[0]
    return o


def bench_growth(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    T = options.shortest
    while T <= options.longest:
        inputs = make_inputs(T, options.heads, options.dim, torch.float32, options.device)
        times = medians(
            {
                "forward": without_gradients(forward, inputs, (31,)),
                "forward+backward": with_gradients(forward, inputs, (31,)),
            },
            options.device,
            options.repeats,
        )
        for what, time in times.items():
            before = [row for row in rows if row["what"] == what]
            ratio = time["median"] / before[-1]["seconds"]["median"] if before else None
            shape = {"T": T, "H": options.heads, "D": options.dim, "V": options.dim, "dtype": "float32"}
            rows.append(
                {"part": "growth", "what": what, **shape, "steps": [31], "seconds": time, "ratio to half T": ratio}
            )
            print(f"growth  T {T:6d}  {what:17s} {time['median']:8.3f} s  x{ratio or 0:.2f}", flush=True)
        T *= 2
    return rows


def bench_peer(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    T, H, D = 4096, 8, 128
    for dtype, solver_steps in ((torch.float32, (31,)), (torch.bfloat16, (16, 16))):
        inputs = make_inputs(T, H, D, dtype, options.device)
        ours, peer = f"gka {solver_steps}", "gated delta rule (transformers)"
        for what, wrap in (("forward", without_gradients), ("forward+backward", with_gradients)):
            functions = {ours: wrap(forward, inputs, solver_steps), peer: wrap(delta_rule, inputs)}
            times = medians(functions, options.device, options.repeats)
            for name, time in times.items():
                ratio = time["median"] / times[peer]["median"]
                shape = {"T": T, "H": H, "D": D, "V": D, "dtype": str(dtype).removeprefix("torch.")}
                rows.append({"part": "peer", "what": what, "op": name, **shape, "seconds": time, "ratio": ratio})
                print(f"peer    {shape['dtype']:9s} {what:17s} {name:32s} {time['median']:7.3f} s  x{ratio:.2f}")
    return rows


def held_bytes(inputs: Inputs, T: int, H: int, D: int, chunk_size: int) -> dict[str, int]:
    """Bytes that forward + backward must keep: inputs, output, their gradients, states at every chunk."""
    given = sum(tensor.nbytes for tensor in inputs.values())
    output = inputs["v"].nbytes
    states = -(-T // chunk_size) * H * D * 2 * D * 4
    return {"inputs": given, "output": output, "gradients": given + output, "chunk states": states}


def _peak_resident_bytes() -> int:
    """Peak memory of this process (Linux). getrusage would include the parent process up to the start."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[0]) * 1024


def measure_memory(T: int, H: int, D: int, dtype_name: str) -> dict[str, Any]:
    """In a new process: peak bytes above the memory before the inputs exist, and the bytes that must be kept."""
    device, dtype = torch.device("cpu"), getattr(torch, dtype_name)
    with_gradients(forward, make_inputs(256, H, D, dtype, device), None)()  # initialises libraries
    before = psutil.Process().memory_info().rss
    inputs = make_inputs(T, H, D, dtype, device)
    with_gradients(forward, inputs, None)()
    peak = _peak_resident_bytes() - before
    held = held_bytes(inputs, T, H, D, default_chunk_size(device))
    return {"peak bytes": peak, "held bytes": held, "ratio": peak / sum(held.values())}


def bench_memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for T, H, D, dtype in ((4096, 8, 128, "float32"), (16384, 8, 128, "float32"), (16384, 8, 128, "bfloat16")):
        arguments = [str(T), str(H), str(D), dtype]
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.bench_ops", "--measure-memory", *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        row = {"part": "memory", "what": "forward+backward", "T": T, "H": H, "D": D, "V": D, "dtype": dtype}
        rows.append({**row, **json.loads(child.stdout)})
        peak, held = rows[-1]["peak bytes"] / 2**20, sum(rows[-1]["held bytes"].values()) / 2**20
        print(
            f"memory  T {T:6d} {dtype:9s} peak {peak:7.0f} MiB, held {held:7.0f} MiB, x{peak / held:.2f}",
            flush=True,
        )
    return rows


def bench_wide(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for B, T, H in options.shapes:
        made = make_inputs(B * T, H, 128, torch.bfloat16, options.device)
        inputs = {n: x.detach().view(B, T, *x.shape[2:]).requires_grad_() for n, x in made.items()}
        shape = {"B": B, "T": T, "H": H, "D": 128, "V": 128, "dtype": "bfloat16"}
        functions: dict[str, Callable[[Inputs], Tensor]] = {
            f"gka {solver_steps}": partial(forward, solver_steps=solver_steps)
            for solver_steps in ((16, 16), (16, 8), (31,))
        }
        functions["gka cg (10, 10)"] = partial(forward, solver="cg", solver_steps=(10, 10))
        peers, note = op_peers(options.device)
        functions |= peers
        if unknown := set(options.without) - set(functions):
            raise SystemExit(f"--without {' '.join(unknown)}: not among {', '.join(functions)}")
        functions = {name: function for name, function in functions.items() if name not in options.without}
        for what, wrap in (("forward", without_gradients), ("forward+backward", with_gradients)):
            calls = {name: wrap(function, inputs) for name, function in functions.items()}
            first = first_calls(calls, options.device)
            times = medians(calls, options.device, options.repeats)
            for name, time in times.items():
                row = {"part": "wide", "what": what, "op": name, **shape, "seconds": time, **first[name]}
                if options.device.type == "cuda" and name == "gka (16, 16)" and what == "forward+backward":
                    row["kernels"] = stages.seconds_by_kernel(calls[name])
                milliseconds = time["median"] * 1e3
                print(f"wide    B {B} T {T:6d} H {H:2d} {what:17s} {name:15s} {milliseconds:8.3f} ms", flush=True)
                yield row | ({"note": note} if note and name in ("Gated DeltaNet", "simple GLA") else {})


def shape(text: str) -> tuple[int, int, int]:
    B, T, H = map(int, text.split(","))
    return B, T, H


PARTS = {"growth": bench_growth, "peer": bench_peer, "memory": bench_memory}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_ops", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--only", choices=[*PARTS, "wide", "length"], action="append",
        help="parts to run; default: all except wide and length",
    )  # fmt: skip
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cpu"), help="device for growth, peer, wide and length"
    )
    parser.add_argument(
        "--shapes", type=shape, nargs="+", metavar="B,T,H", default=[(1, 131072, 16), (4, 8192, 8)],
        help="wide: shapes; default 1,131072,16 4,8192,8",
    )  # fmt: skip
    parser.add_argument(
        "--without", action="append", default=[], metavar="NAME", help="wide: name of an op to leave out"
    )
    parser.add_argument("--shortest", type=int, default=4096, help="growth: smallest T")
    parser.add_argument("--longest", type=int, default=65536, help="growth: largest T")
    parser.add_argument("--heads", type=int, default=4, help="growth: H")
    parser.add_argument("--dim", type=int, default=64, help="growth: D = V")
    parser.add_argument("--least-tokens", type=int, default=2**11, help="length: smallest T")
    parser.add_argument("--most-tokens", type=int, default=2**20, help="length: largest T of forward")
    parser.add_argument("--most-tokens-backward", type=int, default=2**18, help="length: largest T with backward")
    parser.add_argument(
        "--limit", type=float, default=10.0, help="length: seconds per call; a slower op is not run at greater T"
    )
    parser.add_argument("--repeats", type=int, default=5, help="number of timed calls; the median counts")
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON file; default: benchmarks/results/ops_MACHINE_DATE.json, overwritten by later runs of the day",
    )
    parser.add_argument("--measure-memory", nargs=4, metavar=("T", "H", "D", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_memory:
        T, H, D, dtype = options.measure_memory
        print(json.dumps(measure_memory(int(T), int(H), int(D), dtype)))
        return
    chosen = options.only or list(PARTS)
    if "length" in chosen and len(chosen) > 1:
        parser.error("--only length writes a separate file; run it without other parts")
    parts: dict[str, Callable[[argparse.Namespace], Iterable[dict[str, Any]]]] = {
        **PARTS, "wide": bench_wide, "length": bench_length,
    }  # fmt: skip
    rows = (row for part in chosen for row in parts[part](options))
    command = " ".join(["python -m benchmarks.bench_ops", *sys.argv[1:]])
    path = write_result("length" if chosen == ["length"] else "ops", rows, command, options.output)
    if chosen == ["length"]:
        plot(path)
    elif "wide" in chosen:
        stages.plot(path)


if __name__ == "__main__":
    main()
