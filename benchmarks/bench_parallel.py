"""Time of the op, its sums and the layer on a sequence that several processes share, compared with one process.

    torchrun --nproc_per_node 8 -m benchmarks.bench_parallel --device cuda            # takes about two minutes
    torchrun --nproc_per_node 8 -m benchmarks.bench_parallel --device cuda --check    # errors instead of times
    torchrun --nproc_per_node 2 -m benchmarks.bench_parallel --tokens 64 --hidden 32 --heads 2   # quick, on a CPU

    op         `gka.distributed.gated_kalmanet`
    sums       what its tokens add to the running sums, the work that a rank has besides the op; nothing is sent
    exchange   the sums of all ranks, sent and folded into the state before a rank's tokens; not for one rank
    layer      `GatedKalmaNet` with the parts of a row

It measures forward, and forward + backward with the gradients of all inputs, in the layer also of its parameters.
All ranks share the row, in each layout; then rank 0 alone has the whole row while the others wait. All ranks begin
together, and the time is that of the slowest. Gradients of parameters stay on their ranks: averaging them is the
work of data parallelism.

Bytes are those that a rank receives: n - 1 pieces for each all-gather or reduce-scatter of n ranks.

--check compares o and all gradients of n ranks with those of rank 0 alone, ||a - b|| / ||b||, by a random loss
through o, and fails beyond the bounds of `BOUNDS`.

Legend: n ranks, T tokens of the row, H heads, D head dim.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import gka
from benchmarks.calls import make_inputs
from benchmarks.ranks import process_group, write_by_first
from experiments.evidence.table import markdown_table
from experiments.evidence.timing import seconds
from gka import ops
from gka.distributed import ContextParallel, Part, collectives, gated_kalmanet
from gka.distributed.context_parallel import LAYOUTS
from gka.distributed.fold import states_before
from gka.distributed.op import segments_of
from gka.distributed.sums import SpanSums, span_sums

Results = dict[str, Tensor]
Call = Callable[[bool], Results]
PARTS = ("op", "sums", "exchange", "layer")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Rounding of o and of dq, dk, dv to bfloat16, and the errors of two solves.
BOUNDS = {"bfloat16": 2e-2, "float32": 1e-3}


def op_call(inputs: Results, cotangent: Tensor, shard: Any) -> Call:
    """o and gradients of the op on all tokens, or on the shard of this rank."""
    names = list(inputs)
    mine = {name: cut(x, shard).requires_grad_() for name, x in inputs.items()}

    def run(backward: bool) -> Results:
        with torch.set_grad_enabled(backward):
            if shard is None:
                o, _ = ops.gated_kalmanet(*mine.values())
            else:
                o, _ = gated_kalmanet(*mine.values(), shard=shard)
        if not backward:
            return {"o": o}
        grads = torch.autograd.grad(o, list(mine.values()), cut(cotangent, shard))
        return {"o": o, **{f"d{name}": grad for name, grad in zip(names, grads, strict=True)}}

    return run


def sums_call(inputs: Results, _: Tensor, shard: Any) -> Call:
    """The sums over this rank's tokens, and the gradients of keys, values and gates."""
    mine = {name: cut(inputs[name], shard).requires_grad_() for name in ("k", "v", "g", "beta")}

    def run(backward: bool) -> Results:
        with torch.set_grad_enabled(backward):
            found = span_sums(*mine.values(), normalize_k=True, with_kk=True)
        if not backward:
            return {"sums": found.flat}
        grads = torch.autograd.grad(found.flat, list(mine.values()), found.flat)
        return {"sums": found.flat} | {f"d{name}": grad for name, grad in zip(mine, grads, strict=True)}

    return run


def exchange_call(inputs: Results, _: Tensor, shard: Any) -> Call:
    """The states before this rank's tokens from the sums of each rank, and the gradients of these sums."""
    B, _, H, D = inputs["q"].shape
    segments = segments_of(shard)
    flat = torch.randn(B, H, 2 * D * D + 1, device=inputs["q"].device).abs().neg().requires_grad_()
    reach = [(segment.origin, segment.piece) for segment in segments]

    def run(backward: bool) -> Results:
        with torch.set_grad_enabled(backward):
            states = states_before([SpanSums(flat, D, D, with_kk=True)] * len(segments), reach, shard)
        outputs = [x for state in states for x in state if x is not None]
        if backward:
            torch.autograd.grad(outputs, flat, [x.detach() for x in outputs])
        return {"states": outputs[0]}

    return run


def layer_call(layer: torch.nn.Module, x: Tensor, cotangent: Tensor, shard: Any) -> Call:
    """The same of a layer: its output, and the gradients of its input and its parameters."""
    mine, part = cut(x, shard).requires_grad_(), None if shard is None else Part(shard)
    parameters = dict(layer.named_parameters())

    def run(backward: bool) -> Results:
        with torch.set_grad_enabled(backward):
            out = layer(mine, context_parallel=part)
        if not backward:
            return {"o": out}
        dx, *grads = torch.autograd.grad(out, [mine, *parameters.values()], cut(cotangent, shard))
        return {"o": out, "dx": dx, **{f"parameter {n}": grad for n, grad in zip(parameters, grads, strict=True)}}

    return run


def cut(x: Tensor, shard: Any) -> Tensor:
    """This rank's part of a global tensor, as a tensor of its own; all of it without a shard."""
    return (x if shard is None else shard.take(x)).detach().clone()


def calls(options: argparse.Namespace, part: str) -> Iterator[tuple[str, Call | None, Any]]:
    """The layouts by name, and "one rank", with their calls; ranks other than 0 have none for the last."""
    torch.manual_seed(0)
    T, dtype = options.tokens, DTYPES[options.dtype]
    if part != "layer":
        inputs = make_inputs(T, options.heads, options.head_dim, dtype, options.device)
        cotangent = torch.randn_like(inputs["v"])
        of_part = {"op": op_call, "sums": sums_call, "exchange": exchange_call}[part]
        make: Callable[[Any], Call] = lambda shard: of_part(inputs, cotangent, shard)  # noqa: E731
    else:
        layer = gka.GatedKalmaNet(options.hidden, options.heads, head_dim=options.head_dim)
        layer = layer.to(options.device, dtype)
        x = torch.randn(1, T, options.hidden, device=options.device, dtype=dtype)
        cotangent = torch.randn_like(x)
        make = lambda shard: layer_call(layer, x, cotangent, shard)  # noqa: E731
    for layout in options.layouts:
        shard = ContextParallel(dist.group.WORLD, layout).shard(T)
        yield layout, make(shard), shard
    if part != "exchange":
        yield "one rank", make(None) if dist.get_rank() == 0 else None, None


def slowest_seconds(call: Call | None, backward: bool, device: torch.device, repeats: int) -> dict[str, float]:
    """Median, least and largest seconds of a call, on the slowest rank; all ranks begin together."""
    times = []
    for n in range(repeats + 2):
        dist.barrier()
        spent = torch.tensor(0.0 if call is None else seconds(lambda: call(backward), device), device=device)
        dist.all_reduce(spent, dist.ReduceOp.MAX)
        if n >= 2:  # the first calls compile
            times.append(spent.item())
    return {"median": statistics.median(times), "least": min(times), "largest": max(times)}


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """The bytes that this rank receives in each collective of the library."""
    found: list[int] = []

    def counting(function: Any) -> Any:
        def call(out: Tensor, given: Tensor, group: Any) -> Any:
            piece = min(out.numel(), given.numel()) * given.element_size()
            found.append((dist.get_world_size(group) - 1) * piece)
            return function(out, given, group=group)

        return call

    names = ("_gather_into", "_reduce_scatter_into")
    with mock.patch.multiple(collectives, **{name: counting(getattr(collectives, name)) for name in names}):
        yield found


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    ranks = dist.get_world_size()
    size = {"T": options.tokens, "H": options.heads, "D": options.head_dim, "dtype": options.dtype}
    for part in options.parts:
        for name, call, shard in calls(options, part):
            for what in ("forward", "forward+backward"):
                backward = what != "forward"
                time = slowest_seconds(call, backward, options.device, options.repeats)
                row = {"part": part, "what": what, "layout": name, "ranks": ranks if shard else 1, **size}
                row |= {"seconds": time}
                if shard is not None and call is not None:
                    with counted_bytes() as received:
                        call(backward)
                    row["bytes"] = received
                if part == "layer":
                    row["hidden"] = options.hidden
                say(f"{part:10s}{what:18s}{name:12s}{time['median'] * 1e3:10.3f} ms  {row.get('bytes', '')}")
                yield row


def parallel_table(result: dict[str, Any]) -> str:
    """Markdown of the rows of a result file: all ranks of each layout, and one rank."""
    rows, lines = result["rows"], []
    alone = {(row["part"], row["what"]): row["seconds"]["median"] for row in rows if row["layout"] == "one rank"}
    for row in rows:
        median = row["seconds"]["median"]
        reference = alone.get((row["part"], row["what"]))
        received = f"{sum(row['bytes']) / 1e6:.3g}" if "bytes" in row else ""
        lines.append(
            [
                f"{row['part']}, T {row['T']}, H {row['H']}, D {row['D']}, {row['dtype']}",
                row["what"],
                "whole" if row["layout"] == "one rank" else row["layout"],
                str(row["ranks"]),
                f"{median * 1e3:.2f}",
                "" if reference is None else f"{reference / median:.2f}",
                received,
            ]
        )
    header = [
        "part",
        "what",
        "layout",
        "GPUs",
        "median ms",
        "times faster than one GPU",
        "MB received by a GPU",
    ]
    return markdown_table(header, lines)


def check(options: argparse.Namespace) -> bool:
    """Print ||a - b|| / ||b|| of o and of each gradient, n ranks and one; whether all are within the bound."""
    bound, fits = BOUNDS[options.dtype], True
    for part in (part for part in options.parts if part in ("op", "layer")):
        found: dict[str, Results] = {}
        for name, call, shard in calls(options, part):
            results = {} if call is None else call(True)
            found[name] = {key: x if shard is None else whole(key, x, shard) for key, x in results.items()}
        alone = found.pop("one rank")
        if dist.get_rank():
            continue
        for name, results in found.items():
            for key, x in results.items():
                ref = alone[key].double()
                error = ((x.double() - ref).norm() / ref.norm()).item()
                fits &= error <= bound
                say(f"{part:10s}{name:12s}{key:28s}{error:10.2e}{'' if error <= bound else f'  beyond {bound:g}'}")
    return fits


def whole(key: str, x: Tensor, shard: Any) -> Tensor:
    """The global tensor of all ranks' parts; of the gradient of a parameter the sum."""
    if not key.startswith("parameter"):
        gathered: Tensor = shard.gather(x.detach())
        return gathered
    total = x.float()
    dist.all_reduce(total)
    return total


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_parallel",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one GPU for each process")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--tokens", type=int, default=131072, help="T, of the whole sequence; default 131072")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, help="default: hidden / heads")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5, help="number of timed calls; the median counts")
    parser.add_argument("--check", action="store_true", help="compare the results, measure no time")
    parser.add_argument(
        "--output", type=Path, help="JSON file; default: benchmarks/results/parallel_MACHINE_DATE.json"
    )
    options = parser.parse_args()
    options.head_dim = options.head_dim or options.hidden // options.heads
    return options


def main() -> None:
    options = parse()
    with process_group(options.device) as options.device:
        if not options.check:
            write_by_first("parallel", bench(options), options.output)
        elif not check(options):
            sys.exit("some results differ by more than rounding")


if __name__ == "__main__":
    main()
