"""Time of one decode step whose states are rows of a pool, compared with contiguous states and with a copy.

    python -m benchmarks.bench_pool --device cuda
    python -m benchmarks.bench_pool --requests 1 2 --rows 8 --heads 2 --dim 16    # a quick run on a CPU

A server keeps the states of all requests in a pool. A row of it has both states of a request, one after the other.

copy:       both states of all requests copied; a step must read and write as many bytes.
contiguous: `gated_kalmanet_step`, in place, on the states of these requests alone.
pool:       the same with `state_indices`, random rows of the pool.
copied rows: the rows gathered, `gated_kalmanet_step` on them, and written back.

Times are per step, on a GPU replayed from a CUDA graph. Successive steps use other rows, or other sets of states,
so that a few requests do not find their states in the L2 cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_decode import Call, in_turn, make_inputs, make_states, peers_by_name, replayed
from benchmarks.common import medians, write_result
from experiments.evidence.table import markdown_table
from gka.ops import State, gated_kalmanet_step
from gka.ops.pool import gather_rows, scatter_rows_

SOLVER_STEPS = (16, 16)
STEP: dict[str, Any] = {"solver_steps": SOLVER_STEPS, "normalize_qk": True, "inplace": True}


def make_pool(N: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> State:
    """N rows of one storage, each with both states."""
    pages = torch.empty(N, 2, H, D, D, dtype=dtype, device=device)
    pool = State(pages[:, 0], pages[:, 1])
    for part, row in zip(pool, make_states(1, H, D, dtype, device, 1)[0], strict=True):
        assert part is not None and row is not None
        part.copy_(row)
    return pool


def steps_of_requests(B: int, N: int, sets: int, device: torch.device) -> list[Tensor]:
    """Rows of each step, [B] of int32 without repeats; no row is in two steps if the pool has that many."""
    torch.manual_seed(2)
    rows: list[Tensor] = []
    while len(rows) < sets:
        rows += torch.randperm(N)[: N // B * B].split(B)
    return [step.to(device, torch.int32) for step in rows[:sets]]


def calls_by_name(
    inputs: list[Tensor], states: list[State], pool: State, rows: list[Tensor]
) -> dict[str, list[Call]]:
    """The functions to time, one call per step."""

    def contiguous(state: State) -> Call:
        return lambda: gated_kalmanet_step(*inputs, state=state, **STEP)

    def by_index(indices: Tensor) -> Call:
        return lambda: gated_kalmanet_step(*inputs, state=pool, state_indices=indices, **STEP)

    def copied(indices: Tensor) -> Call:
        def call() -> None:
            parts = [part for part in pool if part is not None]
            state = [gather_rows(part, indices) for part in parts]
            gated_kalmanet_step(*inputs, state=state, **STEP)
            for part, new in zip(parts, state, strict=True):
                scatter_rows_(part, indices, new)

        return call

    return {
        "copy": peers_by_name(inputs, states)["floor"],
        "contiguous": [contiguous(state) for state in states],
        "pool": [by_index(indices) for indices in rows],
        "copied rows": [copied(indices) for indices in rows],
    }


@torch.no_grad()
def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    H, D, N, device = options.heads, options.dim, options.rows, options.device
    for dtype in (torch.float32, torch.bfloat16):
        pool = make_pool(N, H, D, dtype, device)
        for B in options.requests:
            sets = max(2, min(16, 256 // B)) if device.type == "cuda" else 2
            inputs = make_inputs(B, H, D, torch.bfloat16, device)
            states = make_states(B, H, D, dtype, device, sets)
            calls = calls_by_name(inputs, states, pool, steps_of_requests(B, N, sets, device))
            wrap = replayed if device.type == "cuda" else in_turn
            functions = {name: wrap(each) for name, each in calls.items()}
            for name, times in medians(functions, device, options.repeats).items():
                per_step = {key: value / sets for key, value in times.items()}
                shape = {"B": B, "N": N, "H": H, "D": D, "V": D, "states": str(dtype).removeprefix("torch.")}
                moved = sum(2 * part.nbytes for part in states[0] if part is not None)  # read and written
                yield {"what": name, **shape, "steps": SOLVER_STEPS, "bytes": moved, "seconds": per_step}
                print(f"{shape['states']:8s} B {B:4d} {name:12s} {per_step['median'] * 1e3:8.4f} ms", flush=True)


def pool_table(result: dict[str, Any]) -> str:
    """Milliseconds of each way to step, one row per dtype of the states and number of requests."""
    rows, table = result["rows"], []
    names = list(dict.fromkeys(row["what"] for row in rows))
    for states, B in dict.fromkeys((row["states"], row["B"]) for row in rows):
        same = {row["what"]: row for row in rows if (row["states"], row["B"]) == (states, B)}
        times = {name: row["seconds"]["median"] for name, row in same.items()}
        ratios = [
            f"{times['pool'] / times[name]:.2f}" if "pool" in times else "" for name in ("contiguous", "copy")
        ]
        megabytes = f"{same[names[0]]['bytes'] / 1e6:.0f}"
        cells = [f"{times[name] * 1e3:.3f}" if name in times else "" for name in names]
        table.append([states, str(B), megabytes, *cells, *ratios])
    first = rows[0]
    header = ["states", "requests", "MB read and written", *names, "pool / contiguous", "pool / copy"]
    shape = f"{first['N']:,} rows, H {first['H']}, D = V = {first['D']}, steps {tuple(first['steps'])}, median ms"
    return f"One decode step of requests at random rows of a pool ({shape})\n\n{markdown_table(header, table)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_pool",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="device; default cpu")
    parser.add_argument(
        "--requests", type=int, nargs="+", default=[1, 16, 64, 256], metavar="B", help="numbers of requests"
    )
    parser.add_argument("--rows", type=int, default=1024, metavar="N", help="rows of the pool, at least as many")
    parser.add_argument("--heads", type=int, default=16, help="number of heads H")
    parser.add_argument("--dim", type=int, default=128, help="head dims D = V")
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds, of which the median counts")
    parser.add_argument("--output", type=Path, help="JSON file; default: pool_MACHINE_DATE.json in results/")
    options = parser.parse_args()
    if max(options.requests) > options.rows:
        parser.error(
            f"--rows is {options.rows}; expected at least {max(options.requests)}, the requests of a step"
        )
    command = " ".join(["python -m benchmarks.bench_pool", *sys.argv[1:]])
    write_result("pool", bench(options), command, options.output)


if __name__ == "__main__":
    main()
