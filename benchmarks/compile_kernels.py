"""Compile every kernel for several GPUs, without a GPU, and list registers, spills and shared memory.

    python -m benchmarks.compile_kernels                 # all architectures, prints a table
    python -m benchmarks.compile_kernels --arch 90       # Hopper only
    python -m benchmarks.compile_kernels --check         # exit code 1 if worse than benchmarks/kernels.json
    python -m benchmarks.compile_kernels --write         # update that file

The kernels are those of the op, the short convolution, the gates and the gated norm, forward and backward, and of
a decode step. Launches are recorded and not run. ptxas and cuobjdump come with Triton.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from gka.ops.triton.kernels.conjugate_gradient import compiles_tolerance

COMMITTED = Path(__file__).parent / "kernels.json"
ARCHITECTURES = {80: "A100", 86: "RTX 30, A10", 89: "RTX 40, L4", 90: "H100, H200", 100: "B200"}
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
KEYS = ("case", "kernel", "architecture")
Launch = tuple[JITFunction, dict[str, Any], dict[str, int]]


@contextmanager
def taken_down() -> Iterator[list[Launch]]:
    """Record kernel launches, with arguments and options, instead of running them."""
    launches: list[Launch] = []

    def run(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        values = dict(zip(kernel.arg_names, arguments, strict=False))
        options = {name: named.pop(name) for name in list(named) if name not in kernel.arg_names}
        launches.append((kernel, {**values, **named}, options))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def source(kernel: JITFunction, values: dict[str, Any]) -> ASTSource:
    """The source that the launcher of Triton would compile for these arguments."""
    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name], constants[(number,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned and not parameter.do_not_specialize:
            attributes[(number,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack of a kernel, from cuobjdump."""
    tool = next((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("cuobjdump*"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "stack bytes": int(found["STACK"])}


def launches(
    dtype: torch.dtype, D: int, solver_steps: tuple[int, ...], architecture: int, **solver: Any
) -> list[Launch]:
    """Kernels of the forward and backward pass of the op, with gates, states and normalised q and k."""
    from gka.ops import State, gated_kalmanet
    from gka.ops.triton import config

    q, k, v = (torch.randn(1, 4224, 16, D, dtype=dtype, requires_grad=True) for _ in range(3))
    gates = [torch.rand(1, 4224, 16, requires_grad=True) for _ in range(3)]
    states = [torch.zeros(1, 16, D, D, requires_grad=True) for _ in range(2)]
    initial = State(states[0] if solver_steps else None, states[1])
    capability = mock.patch.object(config, "capability", return_value=divmod(architecture, 10))
    with mock.patch.object(config, "INTERPRETED", True), capability, taken_down() as found:
        o, final = gated_kalmanet(
            q, k, v, -gates[0], *gates[1:], solver_steps=solver_steps, normalize_qk=True, backend="triton",
            initial_state=initial, output_final_state=True, **solver,
        )  # fmt: skip
        torch.autograd.backward(
            [x for x in (o, *final) if x is not None], [x for x in (o, *final) if x is not None]
        )
    return distinct(found)


def step_launches(state: torch.dtype, D: int, pool: bool = False, **solver: Any) -> list[Launch]:
    """The kernel of a decode step, for a layer with gates; states in a pool by int32 indices."""
    from gka.ops.triton import step as triton_step
    from gka.ops.types import Arguments

    q, k, v = (torch.randn(1, 16, D, dtype=torch.bfloat16) for _ in range(3))
    gates = [torch.rand(1, 16) for _ in range(3)]
    states = [torch.zeros(1, 16, D, D, dtype=state) for _ in range(2)]
    arguments = Arguments(q, k, v, -gates[0], *gates[1:], *states, None, 0.02, (16, 16), 1.0, normalize_qk=True)
    arguments = arguments._replace(**solver)
    with mock.patch.object(triton_step, "INTERPRETED", True), taken_down() as found:
        indices = torch.zeros(1, dtype=torch.int32) if pool else None
        triton_step.gated_kalmanet_step(arguments, inplace=True, state_indices=indices)
    return distinct(found)


def conv_step_launches() -> list[Launch]:
    """The kernel of the short convolution of one token, the past in a pool [N, W - 1, C]."""
    from gka.ops.triton.conv_step import conv_step

    x, weight = torch.zeros(1, 4096, dtype=torch.bfloat16), torch.zeros(4096, 4, dtype=torch.bfloat16)
    pool = torch.zeros(1, 3, 4096, dtype=torch.bfloat16).transpose(1, 2)
    with taken_down() as found:
        conv_step(x, weight, pool, torch.zeros(1, dtype=torch.int32))
    return distinct(found)


def conv_launches(kind: str) -> list[Launch]:
    """Kernels of the forward and backward pass of the short convolution."""
    from gka.ops.triton.conv import short_convs

    xs = [torch.zeros(1, 300, C, dtype=torch.bfloat16, requires_grad=True) for C in (2048, 1024, 1024)]
    weight = torch.zeros(4096, 4, dtype=torch.bfloat16, requires_grad=True)
    place = torch.arange(300, dtype=torch.int32) if kind == "packed" else None
    front = torch.zeros(1, 3, 4096, dtype=torch.bfloat16) if kind == "with earlier inputs" else None
    with taken_down() as found:
        ys = short_convs(xs, weight, place, front)
        torch.autograd.backward(ys, ys)
    return distinct(found)


def span_launches(D: int) -> list[Launch]:
    """Kernels of the sums of a span of tokens, and of their gradients."""
    from gka.ops.triton.kernels.span import launch_span_gradients, launch_span_sums

    k, g = torch.zeros(1, 300, 2, D, dtype=torch.bfloat16), torch.zeros(1, 300, 4)
    with taken_down() as found:
        sums, to_end, w = launch_span_sums(k, k, g, g, normalize=True, with_kk=True)
        launch_span_gradients(sums, k, k, g, g, to_end, w, normalize=True, with_kk=True)
    return distinct(found)


def norm_launches(dtype: torch.dtype, V: int) -> list[Launch]:
    """Kernels of the forward and backward pass of the gated norm."""
    from gka.ops.triton.norm import gated_rms_norm

    x, gate, weight = (torch.zeros(*shape, dtype=dtype, requires_grad=True) for shape in ((9, V), (9, V), (V,)))
    with taken_down() as found:
        y = gated_rms_norm(x, gate, weight, 1e-6)
        y.backward(y)
    return distinct(found)


def gate_launches(masked: bool) -> list[Launch]:
    """Kernels of the forward and backward pass of the gates."""
    from gka.ops.triton.gates import gates

    raw, vectors = torch.zeros(2, 9, 48, dtype=torch.bfloat16, requires_grad=True), torch.zeros(4, 16)
    with taken_down() as found:
        made = gates(raw, vectors, torch.ones(2, 9, dtype=torch.bool) if masked else None, (True, True, True))
        torch.autograd.backward(made, made)
    return distinct(found)


def distinct(found: list[Launch]) -> list[Launch]:
    """The launches with different code, each once."""
    unique: dict[tuple[Any, ...], Launch] = {}
    for kernel, values, options in found:
        constants = tuple(values[p.name] for p in kernel.params if p.is_constexpr)
        unique.setdefault((kernel.fn.__name__, constants), (kernel, values, options))
    return list(unique.values())


CASES = {
    "bfloat16 D 128 (16, 16)": (torch.bfloat16, 128, (16, 16)),
    "bfloat16 D 64 (16, 16)": (torch.bfloat16, 64, (16, 16)),
    "float16 D 128 (16, 16)": (torch.float16, 128, (16, 16)),
    "bfloat16 D 64 ()": (torch.bfloat16, 64, ()),
    "float32 D 64 (31,)": (torch.float32, 64, (31,)),
}
# Of the same op the solves alone: the others are those of the cases above.
SOLVE_CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "bfloat16 D 128 cg (10, 10)": ((torch.bfloat16, 128, (10, 10)), {"solver": "cg"}),
    "bfloat16 D 64 cg (10, 10)": ((torch.bfloat16, 64, (10, 10)), {"solver": "cg"}),
    "bfloat16 D 128 cg tolerance": ((torch.bfloat16, 128, (32, 32)), {"solver": "cg", "tolerance": 0.05}),
    "float32 D 64 cg (20,)": ((torch.float32, 64, (20,)), {"solver": "cg"}),
}
STEP_CASES = {
    "decode, float32 states, D 128": (torch.float32, 128),
    "decode, bfloat16 states, D 128": (torch.bfloat16, 128),
    "decode, float32 states, D 64": (torch.float32, 64),
}
POOL_STEP_CASES = {
    "decode over a pool, float32 states, D 128": (torch.float32, 128),
    "decode over a pool, bfloat16 states, D 128": (torch.bfloat16, 128),
}
CG_STEP_CASES = {"decode, float32 states, D 128 cg": (torch.float32, 128)}
CONV_STEP_CASE = "convolution, one token over a pool"
CONV_CASES = {f"convolution, {kind}": kind for kind in ("rows", "with earlier inputs", "packed")}
SPAN_CASES = {"sums of a span, D 128": 128, "sums of a span, D 64": 64}
NORM_CASES = {
    "norm, bfloat16 V 128": (torch.bfloat16, 128),
    "norm, float32 V 128": (torch.float32, 128),
    "norm, bfloat16 V 100": (torch.bfloat16, 100),
}
GATE_CASES = {"gates": False, "gates, padded": True}
ALL_CASES = [
    *CASES, *SOLVE_CASES, *STEP_CASES, *POOL_STEP_CASES, *CG_STEP_CASES, *CONV_CASES, CONV_STEP_CASE, *SPAN_CASES,
    *NORM_CASES, *GATE_CASES,
]  # fmt: skip


def launches_of(case: str, architecture: int) -> list[Launch]:
    if case in STEP_CASES:
        return step_launches(*STEP_CASES[case])
    if case in POOL_STEP_CASES:
        return step_launches(*POOL_STEP_CASES[case], pool=True)
    if case == CONV_STEP_CASE:
        return conv_step_launches()
    if case in CG_STEP_CASES:
        return step_launches(*CG_STEP_CASES[case], solver="cg", solver_steps=(20,))
    if case in CONV_CASES:
        return conv_launches(CONV_CASES[case])
    if case in SPAN_CASES:
        return span_launches(SPAN_CASES[case])
    if case in GATE_CASES:
        return gate_launches(GATE_CASES[case])
    if case in NORM_CASES:
        return norm_launches(*NORM_CASES[case])
    if case in SOLVE_CASES:
        arguments, solver = SOLVE_CASES[case]
        return [x for x in launches(*arguments, architecture, **solver) if x[0].fn.__name__ == "solve_chunks"]
    return launches(*CASES[case], architecture)


def compile_case(name: str, architecture: int, only: str | None = None) -> list[dict[str, Any]]:
    """Rows of one case on one architecture."""
    rows = []
    seen: Counter[str] = Counter()
    for kernel, values, options in launches_of(name, architecture):
        seen[kernel.fn.__name__] += 1
        number = seen[kernel.fn.__name__]
        label = kernel.fn.__name__ if number == 1 else f"{kernel.fn.__name__} {number}"
        if only and only not in kernel.fn.__name__:
            continue
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source(kernel, values), target=target, options=options)
        row = {"case": name, "kernel": label, "architecture": architecture}
        row |= {"warps": compiled.metadata.num_warps, **resources(compiled.asm["cubin"])}
        row["shared bytes"] = compiled.metadata.shared
        rows.append(row)
    return rows


def wanted(architectures: list[int], cases: list[str]) -> list[tuple[str, int]]:
    """Cases and architectures that are compiled, in the order of the committed rows."""
    return [
        (name, architecture)
        for name, architecture in itertools.product(cases, architectures)
        # tf32x3 gives the same code everywhere, and ptxas needs minutes for it
        if not (name.startswith("float32 ") and architecture != 90)
        and not (name.startswith("float16 ") and architecture not in (89, 90))
        and ("tolerance" not in name or compiles_tolerance(divmod(architecture, 10)))
    ]


def compile_all(
    architectures: list[int], cases: list[str], only: str | None = None, workers: int = 1
) -> list[dict[str, Any]]:
    """Rows of all cases on all architectures, in this order; several processes compile."""
    rows, places = [], wanted(architectures, cases)
    names, targets = ([place[n] for place in places] for n in range(2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(compile_case, names, targets, itertools.repeat(only)):
            for row in found:
                rows.append(row)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in KEYS)


def worse(rows: list[dict[str, Any]], committed: list[dict[str, Any]]) -> list[str]:
    """One message for each kernel that needs more registers, stack or shared memory than in the committed rows.

    Also for kernels that have no committed row, and for kernels that need too much shared memory.
    """
    found, before_of = [], {key_of(old): old for old in committed}
    for row in rows:
        name = ", ".join(map(str, key_of(row)))
        if row["shared bytes"] > SHARED_LIMIT[row["architecture"]]:
            found.append(f"{name}: {row['shared bytes']} bytes of shared memory are too many")
        before = before_of.get(key_of(row))
        if before is None:
            found.append(f"{name}: not in {COMMITTED.name}")
            continue
        for key in ("registers", "stack bytes", "shared bytes"):
            if row[key] > before[key]:
                found.append(f"{name}: {key} {row[key]}, committed {before[key]}")
    return found


def left_over(rows: list[dict[str, Any]], committed: list[dict[str, Any]]) -> list[str]:
    """One message for each committed row of a kernel that is not compiled, or that stands there twice."""
    left = Counter(map(key_of, committed))
    left.subtract(set(map(key_of, rows)))
    return [f"{', '.join(map(str, key))}: a row too many in {COMMITTED.name}" for key in (+left).elements()]


def merged(
    committed: list[dict[str, Any]], rows: list[dict[str, Any]], only: str | None = None
) -> list[dict[str, Any]]:
    """The committed rows with those of this run in place of theirs, in the order of the cases.

    Rows of cases that there no longer are are left out, and of those of this run the kernels that there no longer
    are, unless it has compiled some kernels alone, `only`.
    """
    order = {place: number for number, place in enumerate(wanted(list(ARCHITECTURES), ALL_CASES))}
    done = {(row["case"], row["architecture"]) for row in rows}
    found = {}
    for row in committed:
        place = row["case"], row["architecture"]
        if place in order and (place not in done or (only and only not in row["kernel"])):
            found[key_of(row)] = row
    found |= {key_of(row): row for row in rows}
    return sorted(found.values(), key=lambda row: (order[row["case"], row["architecture"]], row["kernel"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_kernels",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--arch", type=int, action="append", choices=list(ARCHITECTURES), help="default: all")
    parser.add_argument("--case", action="append", choices=ALL_CASES, help="case; default: all")
    parser.add_argument("--only", help="text that the name of a kernel must contain")
    parser.add_argument("--workers", type=int, default=1, help="number of processes")
    parser.add_argument("--check", action="store_true", help="compare with benchmarks/kernels.json")
    parser.add_argument("--write", action="store_true", help="write benchmarks/kernels.json")
    options = parser.parse_args()
    table = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    rows = compile_all(
        options.arch or list(ARCHITECTURES), options.case or ALL_CASES, options.only, options.workers
    )
    if options.check:
        if triton.__version__ not in table:
            sys.exit(f"{COMMITTED.name} has no rows for Triton {triton.__version__}; add them with --write")
        found = worse(rows, table[triton.__version__])
        if not (options.arch or options.case or options.only):
            found += left_over(rows, table[triton.__version__])
        if found:
            sys.exit("\n".join(found))
    if options.write:
        table[triton.__version__] = merged(table.get(triton.__version__, []), rows, options.only)
        lines = (f" {json.dumps(version)}: [\n  " + ",\n  ".join(map(json.dumps, rows)) + "\n ]"
                 for version, rows in table.items())  # fmt: skip
        COMMITTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
