r"""Training steps of a whole model that FSDP2 shards over all processes, each with sequences of its own.

    torchrun --nproc_per_node 4 -m benchmarks.bench_fsdp --device cuda
    torchrun --nproc_per_node 4 -m benchmarks.bench_fsdp --device cuda --recipes 2.8b --batch 4 --checkpointing
    torchrun --nproc_per_node 2 -m benchmarks.bench_fsdp --recipes 440m --length 64 --batch 1 --layers 2 \
        --hidden 32 --heads 2 --head-dim 16 --vocabulary 100

A step is: gradients to None, forward pass with weights gathered in bfloat16, loss in chunks of 2048 tokens,
backward pass, AdamW of float32 weights and moments. The mixers stand in the same blocks:

    gka         GatedKalmaNet
    attention   softmax attention

    tokens/s   of all processes; the time is that of the slowest
    MFU        as in benchmarks.bench_model; what checkpointing computes again does not count
    peak       the largest allocated memory of a process, with its part of weights, gradients and moments
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import gka
from benchmarks.bench_parallel_model import CHECKPOINT, LOSS_CHUNK, measure, step_of
from benchmarks.ranks import process_group, write_by_first
from benchmarks.recipes import RECIPES, add_size_options, config_of
from experiments.evidence.mfu import peak_of, step_flops
from experiments.evidence.table import markdown_table
from gka.distributed import shard_model


def model_of(recipe: str, mixer: str, options: argparse.Namespace) -> gka.GKAForCausalLM:
    """The recipe's model with one kind of mixer, whole, with the same weights on every rank."""
    config = config_of(recipe, mixer, options)
    torch.manual_seed(0)
    with options.device:
        model = gka.GKAForCausalLM(config).train()
    model.set_loss_chunk(LOSS_CHUNK)
    if options.checkpointing:
        model.gradient_checkpointing_enable(CHECKPOINT)
    return model


def run(recipe: str, mixer: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a recipe with a mixer."""
    device, ranks = options.device, dist.get_world_size()
    model = model_of(recipe, mixer, options)
    flops = step_flops(model, mixer, options.batch, options.length, torch.bfloat16)
    found: dict[str, Any] = {"parameters": model.num_parameters(), "flops of a rank": flops}
    if options.compiled:
        for block in model.model.layers:
            block.compile()
    mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("dp_shard",))
    shard_model(model, mesh, param_dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(dist.get_rank())
    rows = torch.randint(0, options.vocabulary, (options.batch, options.length), generator=generator).to(device)
    loss_of = lambda: model(input_ids=rows, labels=rows, use_cache=False).loss  # noqa: E731
    found |= measure(step_of(model, loss_of, device, autocast=False), options, alone=False)
    seconds = found["seconds"]["median"]
    peak = peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    found["tokens per second"] = ranks * rows.numel() / seconds
    found["mfu"] = None if peak is None else flops / seconds / peak
    return found


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for recipe in options.recipes:
        for mixer in options.mixers:
            row = {"recipe": recipe, "mixer": mixer, "ranks": dist.get_world_size(), "B": options.batch}
            row |= {"T": options.length, "checkpointing": options.checkpointing, "compiled": options.compiled}
            row |= run(recipe, mixer, options)
            gc.collect()  # modules and their gradients are circles
            torch.compiler.reset()
            if options.device.type == "cuda":
                torch.cuda.empty_cache()
            if dist.get_rank() == 0:
                print(", ".join(cells(row)), flush=True)
            yield row


HEADER = (
    "million parameters", "mixer", "GPUs", "sequences of a GPU", "blocks checkpointed", "blocks compiled",
    "tokens/s", "MFU", "peak GB of a GPU",
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of a row under HEADER."""
    peak, mfu = row["peak bytes"], row["mfu"]
    return [
        f"{row['parameters'] / 1e6:,.1f}",
        row["mixer"],
        str(row["ranks"]),
        f"{row['B']} x {row['T']}",
        "yes" if row["checkpointing"] else "no",
        "yes" if row["compiled"] else "no",
        f"{row['tokens per second']:,.0f}",
        "" if mfu is None else f"{mfu:.2f}",
        "" if peak is None else f"{peak / 1e9:.1f}",
    ]


def sharding_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows under HEADER."""
    return markdown_table(HEADER, [cells(row) for row in rows])


def fsdp_table(result: dict[str, Any]) -> str:
    """Tokens per second, MFU and peak memory by size and mixer."""
    return f"Training steps with FSDP2\n\n{sharding_table(result['rows'])}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_fsdp", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one GPU for each process")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["1b", "2.8b"])
    parser.add_argument("--mixers", nargs="+", choices=("gka", "attention"), default=["gka", "attention"])
    parser.add_argument("--batch", type=int, default=4, help="sequences of a process; default 4")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence; default 4096")
    parser.add_argument("--checkpointing", action="store_true", help="compute blocks again in the backward pass")
    parser.add_argument("--compiled", action="store_true", help="compile the blocks by torch.compile")
    add_size_options(parser)
    parser.add_argument("--repeats", type=int, default=4, help="number of timed steps; the median counts")
    parser.add_argument(
        "--output", type=Path, help="JSON file; default: benchmarks/results/fsdp_MACHINE_DATE.json"
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    with process_group(options.device) as options.device:
        write_by_first("fsdp", bench(options), options.output)


if __name__ == "__main__":
    main()
