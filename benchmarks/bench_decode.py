"""Time of one decode step of the op, compared with its floor and with other ops; or of decoding with a model.

    python -m benchmarks.bench_decode --device cuda
    python -m benchmarks.bench_decode --device cuda --model configs/440m.yaml
    python -m benchmarks.bench_decode --batches 1 2 --heads 2 --dim 16    # a quick run on a CPU

With `--model`, the whole model of a recipe decodes through `generate` (`benchmarks/generation.py`).

floor:  a copy of both states, because a step must read and write them.
kernel: `gated_kalmanet_step`, in place (on a GPU the Triton kernel), called from Python.
graph:  the same kernel replayed from a CUDA graph, without the time of the launch.
PyTorch: the step in PyTorch, in place.
gated delta rule: `fused_recurrent_gated_delta_rule` of flash-linear-attention, if it is installed: one token, from
        float32 states to new states. It has one state and no solve.

Times are per step. Successive calls use different sets of states, as the layers of a model do, so that a small
batch does not find its states in the L2 cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import generation
from benchmarks.common import medians, write_result
from gka.ops import State, gated_kalmanet_step
from gka.ops.torch import step as pytorch_step
from gka.ops.types import Arguments

SOLVES = (("chebyshev", (16, 16)), ("chebyshev", (31,)), ("chebyshev", (8,)), ("cg", (10, 10)))
PEER = "gated delta rule (flash-linear-attention)"
Call = Callable[[], object]


def make_inputs(B: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v, g, alpha, beta of one token."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, D, device=device).to(dtype) for _ in range(3))
    gates = [torch.randn(B, H, device=device) for _ in range(3)]
    return [q, k, v, torch.nn.functional.logsigmoid(gates[0] + 4), *(torch.sigmoid(x) for x in gates[1:])]


def make_states(B: int, H: int, D: int, dtype: torch.dtype, device: torch.device, sets: int) -> list[State]:
    """States after 4 D tokens, the same for all sequences."""
    torch.manual_seed(1)
    keys = torch.nn.functional.normalize(torch.randn(H, 4 * D, D, device=device), dim=-1)
    S_kk = (keys.transpose(1, 2) @ keys).to(dtype)
    S_kv = torch.randn(H, D, D, device=device).to(dtype)
    return [State(*(x.expand(B, H, D, D).clone() for x in (S_kk, S_kv))) for _ in range(sets)]


def delta_rule(inputs: list[Tensor], S_kv: Tensor) -> object:
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    q, k, v, g, _, beta = (x.unsqueeze(1) for x in inputs)
    return fused_recurrent_gated_delta_rule(
        q, k, v, g=g, beta=beta, initial_state=S_kv, output_final_state=True, use_qk_l2norm_in_kernel=True
    )


def replayed(calls: list[Call]) -> Call:
    """The calls as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def in_turn(calls: list[Call]) -> Call:
    def call_all() -> None:
        for call in calls:
            call()

    return call_all


def calls_by_name(
    inputs: list[Tensor], states: list[State], solver: str, solver_steps: tuple[int, ...]
) -> dict[str, list[Call]]:
    """The functions to time with this solve, one call per set of states."""
    options: dict[str, Any] = dict(
        ridge_ratio=0.02, solver=solver, solver_steps=solver_steps, normalize_qk=True, inplace=True
    )

    def kernel(state: State) -> Call:
        return lambda: gated_kalmanet_step(*inputs, state=state, **options)

    def in_pytorch(state: State) -> Call:
        scale = inputs[0].shape[-1] ** -0.5
        arguments = Arguments(*inputs, *state, None, 0.02, solver_steps, scale, normalize_qk=True, solver=solver)
        return lambda: pytorch_step.gated_kalmanet_step(arguments, inplace=True)

    return {
        "kernel": [kernel(state) for state in states],
        "PyTorch": [in_pytorch(state) for state in states],
    }


def peers_by_name(inputs: list[Tensor], states: list[State]) -> dict[str, list[Call]]:
    """The functions to time that do not depend on the steps."""
    targets = [State(*(torch.empty_like(x) for x in state)) for state in states]

    def copy(source: State, target: State) -> Call:
        return lambda: [x.copy_(y) for x, y in zip(target, source, strict=True)]

    found: dict[str, list[Call]] = {"floor": [copy(*pair) for pair in zip(states, targets, strict=True)]}
    wide = states[0].S_kv.dtype == torch.float32
    if inputs[0].is_cuda and wide and importlib.util.find_spec("fla") is not None:
        found[PEER] = [lambda state=state: delta_rule(inputs, state.S_kv) for state in states]  # type: ignore[misc]
    return found


@torch.no_grad()
def bench(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    H, D, device = options.heads, options.dim, options.device
    if device.type != "cuda" or importlib.util.find_spec("fla") is None:
        print("flash-linear-attention or a GPU is missing; its step is not measured")
    for B in options.batches or (1, 16, 64, 256):
        inputs = make_inputs(B, H, D, torch.bfloat16, device)
        for dtype in (torch.float32, torch.bfloat16):
            sets = max(2, min(16, 256 // (B * max(1, H // 16)))) if device.type == "cuda" else 2
            states = make_states(B, H, D, dtype, device, sets)
            shape = {"B": B, "H": H, "D": D, "V": D, "states": str(dtype).removeprefix("torch.")}
            parts: list[tuple[str, tuple[int, ...] | None, dict[str, list[Call]]]] = [
                ("", None, peers_by_name(inputs, states)),
                *((*solve, calls_by_name(inputs, states, *solve)) for solve in SOLVES),
            ]
            for solver, solver_steps, calls in parts:
                functions = {name: in_turn(each) for name, each in calls.items()}
                if device.type == "cuda":
                    name = "kernel" if solver_steps else "floor"
                    functions["graph" if solver_steps else "floor"] = replayed(calls[name])
                for name, time in medians(functions, device, options.repeats).items():
                    per_call = {key: value / sets for key, value in time.items()}
                    if solver == "cg":
                        name = f"{name}, cg"
                    rows.append({"what": name, **shape, "steps": solver_steps, "seconds": per_call})
                    label = f"{name} {solver_steps}" if solver_steps else name
                    print(
                        f"B {B:4d} {shape['states']:8s} {label:44s} {per_call['median'] * 1e3:8.4f} ms", flush=True
                    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_decode",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="device; default cpu")
    parser.add_argument("--model", type=Path, metavar="RECIPE", help="YAML file of a model, to decode with it")
    parser.add_argument(
        "--batches", type=int, nargs="+", metavar="B", help="batches; default: 1 16 64 256, with --model 1 64"
    )
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a row, with --model")
    parser.add_argument("--eager", action="store_true", help="with --model: no graph, and nothing is compiled")
    parser.add_argument("--heads", type=int, default=16, help="number of heads H")
    parser.add_argument("--dim", type=int, default=128, help="head dims D = V")
    parser.add_argument("--repeats", type=int, help="timed rounds, of which the median counts; default: 20 or 3")
    parser.add_argument(
        "--output", type=Path, help="JSON file; default: decode_MACHINE_DATE.json or generation_..., in results/"
    )
    options = parser.parse_args()
    command = " ".join(["python -m benchmarks.bench_decode", *sys.argv[1:]])
    options.repeats = options.repeats or (20 if options.model is None else 3)
    if options.model is None:
        write_result("decode", bench(options), command, options.output)
    else:
        write_result("generation", generation.bench(options), command, options.output)


if __name__ == "__main__":
    main()
