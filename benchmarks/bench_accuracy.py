"""Errors of the op with 16-bit inputs, compared with the exact solve in float64.

    python -m benchmarks.bench_accuracy --device cuda      # takes a minute on a GPU
    python -m benchmarks.bench_accuracy                    # on a CPU, the chunk-wise form only

Every error is ||out - ref|| / ||ref||. Rows name the solver, and the number of products of the forward solve; with
a tolerance it is the mean over chunks and heads. The result has three tables:

    families     o and all gradients on the four families of inputs, with alpha and beta 1 or random; the loss uses
                 o only, or the final states only
    trained      the same on the inputs of the layers of a trained model (D = V = 64), 16 and 32 bits
    first tokens the same errors by the position of the token, on packed sequences of 64 tokens; a loss through o

Legend: H heads; D = V = 128.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import write_result
from gka.ops.checks import checked_plan
from gka.ops.solvers import RIDGE_RATIO
from gka.ops.torch.products import products_needed
from gka.ops.types import Arguments
from tests.families import FAMILIES, TRAINED_LAYERS, Family, family_inputs, trained_inputs, with_gates
from tests.helpers import doubled, relative_error, run

PLACES = (0, 1, 2, 4, 8, 16, 32, 64)  # the start of each column, and the end of the last
EXACT = (200,)
# By solver, for 16-bit and 32-bit inputs.
PLANS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "chebyshev": ([{"solver_steps": [16, 16]}, {"solver_steps": [16, 8]}], [{"solver_steps": [31]}]),
    "cg": (
        [{"solver_steps": [10, 10]}, {"solver_steps": [8, 8]}, {"tolerance": 0.03}],
        [{"solver_steps": [20]}, {"solver_steps": [16]}, {"tolerance": 1e-4}],
    ),
}


def on_device(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def cases(options: argparse.Namespace, wide: bool = False) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The fields of a row and the options of the call, for every backend and number of nodes."""
    for backend in ("triton", "chunked") if options.device.type == "cuda" else ("chunked",):
        for solver in options.solvers:
            for plan in PLANS[solver][wide]:
                steps, tolerance = plan.get("solver_steps"), plan.get("tolerance")
                row = {"backend": backend, "solver": solver, "steps": steps, "tolerance": tolerance}
                yield row, {"backend": backend, "solver": solver, **plan}


def family_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, family in FAMILIES.items():
        for random in (False, True):
            inputs = on_device(with_gates(family_inputs(family, options.heads), random), options.device)
            exact = run(doubled(inputs), backend="chunked", solver_steps=EXACT)
            for row, call in cases(options):
                out = run(inputs, **call)
                errors = {key: relative_error(out[key], exact[key]) for key in exact}
                yield {
                    "table": "families",
                    "family": name,
                    "gates": "random" if random else "1",
                    **row,
                    **errors,
                    **products(inputs, call),
                }


def trained_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for layer, wide in itertools.product(TRAINED_LAYERS, (False, True)):
        inputs = on_device(trained_inputs(layer), options.device)
        inputs = {name: x.float() for name, x in inputs.items()} if wide else inputs
        exact = run(doubled(inputs), backend="chunked", solver_steps=EXACT)
        for row, call in cases(options, wide):
            out = run(inputs, **call)
            errors = {key: relative_error(out[key], exact[key]) for key in exact}
            bits = 32 if wide else 16
            yield {"table": "trained", "layer": layer, "bits": bits, **row, **errors, **products(inputs, call)}


def products(inputs: dict[str, Tensor], call: dict[str, Any]) -> dict[str, float]:
    """The number of products of the forward solve of a call, [1, T, H, .] inputs without states."""
    plan = checked_plan(call["solver"], call.get("solver_steps"), call.get("tolerance"), inputs["q"].dtype)
    if plan.tolerance is None:
        return {"products": plan.products}
    tensors = [inputs[name] for name in ("q", "k", "v", "g", "alpha", "beta")]
    arguments = Arguments(*tensors, None, None, None, RIDGE_RATIO, plan.solver_steps, 1.0, False, 64, *plan[1:])
    return {"products": sum(float(stage.mean()) for stage in products_needed(arguments))}


def place_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    length = PLACES[-1]
    for name, family in FAMILIES.items():
        tokens = Family(options.sequences * length, family.m, family.common)
        inputs: dict[str, Any] = with_gates(family_inputs(tokens, options.heads), random=False)
        inputs["cu_seqlens"] = torch.arange(options.sequences + 1) * length
        inputs = on_device(inputs, options.device)
        exact = run(doubled(inputs), backend="chunked", solver_steps=EXACT)
        for row, call in cases(options):
            out = run(inputs, **call)
            for key in ("o", "dq", "dk", "dv", "dg", "dalpha", "dbeta"):
                parts = [x[key].unflatten(1, (options.sequences, length)) for x in (out, exact)]
                errors = {
                    f"{first + 1} to {last}": relative_error(*(part[:, :, first:last] for part in parts))
                    for first, last in itertools.pairwise(PLACES)
                }
                yield {"table": "first tokens", "family": name, **row, "of": key, **errors}


def printed(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        print(
            *(f"{key} {value:.1e}" if isinstance(value, float) else value for key, value in row.items()),
            flush=True,
        )
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--heads", type=int, default=4, help="number of heads of each family")
    parser.add_argument("--sequences", type=int, default=64, help="packed sequences for the second table")
    parser.add_argument("--solvers", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--output", type=Path, help="JSON file; default: a new file in benchmarks/results/")
    options = parser.parse_args()
    command = f"python -m benchmarks.bench_accuracy --device {options.device.type}"

    def rows() -> Iterator[dict[str, Any]]:
        yield from family_rows(options)
        yield from trained_rows(options)
        yield from place_rows(options)

    write_result("accuracy", printed(rows()), command, options.output)


if __name__ == "__main__":
    main()
