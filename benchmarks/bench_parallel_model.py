r"""Training steps of a whole model whose sequences several processes share, compared with one process.

    torchrun --nproc_per_node 4 -m benchmarks.bench_parallel_model --device cuda
    torchrun --nproc_per_node 4 -m benchmarks.bench_parallel_model --device cuda --mixers gka --tokens 1048576 \
        --alone
    torchrun --nproc_per_node 2 -m benchmarks.bench_parallel_model --tokens 64 --hidden 32 --heads 2 --layers 2

One sequence of T random tokens. A step is: gradients to None, forward pass under autocast, loss in chunks of 2048
tokens, backward pass, mean of the gradients over the processes (DDP), AdamW. Blocks are checkpointed, so that one
process can run what several run; with --checkpoint alone they are only for one process alone. The mixers stand in
the same blocks, those of configs/440m.yaml:

    gka         GatedKalmaNet
    attention   softmax attention; each process gathers all keys and values, with layout="zigzag"
    qwen3       transformers' Qwen3 of the same size under PyTorch's `context_parallel`: ring attention; GPUs only

"ranks 1" is rank 0 alone with the whole sequence, without DDP, while the others wait. Time is that of the slowest
process. The peak is the largest allocated memory of a process, with weights, gradients and the optimiser's state.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM

import gka
from benchmarks.ranks import process_group, write_by_first
from benchmarks.recipes import add_size_options, config_of
from experiments.evidence.table import markdown_table
from gka.distributed import ContextParallel, parallelize
from gka.hf.loss import chunked_loss

RECIPE = "440m"
LAYOUTS: dict[str, Any] = {"gka": "contiguous", "attention": "zigzag", "qwen3": "zigzag"}
LOSS_CHUNK = 2048


class Qwen3WithLoss(nn.Module):
    """Qwen3 and its loss in chunks. The mean over the ranks of this rank's loss is that of the row."""

    def __init__(self, config: gka.GKAConfig, ranks: int) -> None:
        super().__init__()
        names = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "head_dim", "tie_word_embeddings",
        )  # fmt: skip
        fields = {name: getattr(config, name) for name in names}
        heads = config.num_attention_heads
        self.model = Qwen3ForCausalLM(Qwen3Config(**fields, num_key_value_heads=heads, attn_implementation="sdpa"))
        self.ranks = ranks

    def forward(self, tokens: Tensor, labels: Tensor, positions: Tensor, number: int) -> Tensor:
        """Tokens, next tokens and positions of this rank, [1, t]; number of labels of the whole row."""
        unmasked = {"full_attention": None}  # causal by the kernel; else a mask is made of positions that jump
        hidden = self.model.model(
            input_ids=tokens, position_ids=positions, attention_mask=unmasked, use_cache=False
        )[0]
        loss = chunked_loss(
            self.model.lm_head, hidden, labels, LOSS_CHUNK, num_items_in_batch=number, shift_labels=labels
        )
        return loss * self.ranks


def qwen3_loss(model: nn.Module, tokens: Tensor, shared: bool) -> tuple[Callable[[], Tensor], Any]:
    """The loss of this rank's part of the row, and the context in which forward and backward pass run."""
    T = tokens.shape[1]
    row = (
        tokens,
        nn.functional.pad(tokens[:, 1:], (0, 1), value=-100),
        torch.arange(T, device=tokens.device).unsqueeze(0),
    )
    parts = [x.clone() for x in row]
    mesh = init_device_mesh(tokens.device.type, (dist.get_world_size(),)) if shared else None

    def ring() -> AbstractContextManager[Any]:
        if mesh is None:
            return nullcontext()
        parts[:] = [x.clone() for x in row]  # they are cut in place
        return context_parallel(mesh, buffers=parts, buffer_seq_dims=[1] * 3, no_restore_buffers=set(parts))

    return lambda: model(*parts, T - 1), ring


# A block draws no random numbers, and has the same shapes each time.
CHECKPOINT = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}


def model_of(mixer: str, options: argparse.Namespace, ranks: int) -> nn.Module:
    """The recipe's model with one kind of mixer; the same weights on every rank."""
    again = options.checkpoint == "always" or ranks == 1
    torch.manual_seed(0)
    config = config_of(RECIPE, mixer, options)
    if mixer == "qwen3":
        with options.device:
            qwen3 = Qwen3WithLoss(config, ranks).train()
        if again:
            qwen3.model.gradient_checkpointing_enable(CHECKPOINT)
        return qwen3
    with options.device:
        model = gka.GKAForCausalLM(config).train()
    model.set_loss_chunk(LOSS_CHUNK)
    if again:
        model.gradient_checkpointing_enable(CHECKPOINT)
    return model


def step_of(
    model: nn.Module,
    loss_of: Callable[[], Tensor],
    device: torch.device,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    autocast: bool = True,
) -> Callable[[], Tensor]:
    """One training step; returns the loss. Forward and backward pass run inside `around()`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with around():
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast and device.type == "cuda"):
                loss = loss_of()
            loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def measure(step: Callable[[], Tensor] | None, options: argparse.Namespace, *, alone: bool) -> dict[str, Any]:
    """Seconds of a step on the slowest rank, the largest peak, and the mean over ranks of the first loss."""
    device = options.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times, losses, failures = [], [], 0
    for _ in range(options.repeats + 1):
        dist.barrier()
        begin = time.perf_counter()
        try:
            if step is not None:
                losses.append(step())
        except torch.OutOfMemoryError:
            if not alone:  # the other ranks wait in a collective that this one will not enter
                raise
            step, failures = None, 1
        if on_gpu:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        figures = torch.tensor([time.perf_counter() - begin, peak, failures], dtype=torch.float64, device=device)
        dist.all_reduce(figures, dist.ReduceOp.MAX)
        times.append(figures[0].item())
    if figures[2]:
        return {"seconds": None, "note": "out of memory"}
    timed = times[1:]  # the first step compiles
    seconds = {"median": statistics.median(timed), "least": min(timed), "largest": max(timed)}
    found: dict[str, Any] = {"seconds": seconds, "peak bytes": int(figures[1]) if on_gpu else None}
    if losses and not alone:
        dist.all_reduce(losses[0])
        losses[0] /= dist.get_world_size()
    return found | {"loss": losses[0].item() if losses else None}


def run(mixer: str, T: int, shared: bool, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one mixer and length, with all ranks or with rank 0 alone."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, options.vocabulary, (1, T), generator=generator).to(options.device)
    if not shared and dist.get_rank():
        return measure(None, options, alone=True)
    model = model_of(mixer, options, dist.get_world_size() if shared else 1)
    if shared and mixer != "qwen3":
        parallelize(model, ContextParallel(dist.group.WORLD, LAYOUTS[mixer]))  # type: ignore[arg-type]
    called = DistributedDataParallel(model, gradient_as_bucket_view=True) if shared else model
    if mixer == "qwen3":
        loss_of, around = qwen3_loss(called, tokens, shared)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return measure(step_of(called, loss_of, options.device, around), options, alone=not shared)
    loss_of = lambda: called(input_ids=tokens, labels=tokens, use_cache=False).loss  # noqa: E731
    return measure(step_of(called, loss_of, options.device), options, alone=not shared)


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    ranks, layers = dist.get_world_size(), config_of(RECIPE, "gka", options).num_hidden_layers
    for T in options.tokens:
        for mixer in options.mixers:
            for shared in (True, False) if T in options.alone and mixer != "qwen3" else (True,):
                row = {"mixer": mixer, "T": T, "ranks": ranks if shared else 1, "layers": layers}
                row["checkpointing"] = options.checkpoint == "always" or not shared
                row |= {"layout": LAYOUTS[mixer] if shared else None, "dtype": "bfloat16 autocast"}
                row |= run(mixer, T, shared, options)
                gc.collect()
                if options.device.type == "cuda":
                    torch.cuda.empty_cache()
                median = row["seconds"]["median"] if row["seconds"] else None
                row["tokens per second"] = None if median is None else T / median
                if dist.get_rank() == 0:
                    print(line(row), flush=True)
                yield row


def line(row: dict[str, Any]) -> str:
    """A row for the screen."""
    what = f"{row['mixer']:10s} T {row['T']:8,d}  ranks {row['ranks']}"
    if row["seconds"] is None:
        return f"{what}  {row['note']}"
    peak = "" if row["peak bytes"] is None else f"  peak {row['peak bytes'] / 1e9:6.1f} GB"
    speed = f"{row['tokens per second']:10,.0f} tokens/s  step {row['seconds']['median']:8.3f} s"
    return f"{what}  {speed}{peak}  loss {row['loss']:.4f}"


def speed_table(rows: Sequence[dict[str, Any]], names: Mapping[str, str]) -> str:
    """Tokens per second by length, mixer and number of GPUs, and how much faster than one GPU of the same rows.

    names: the names of mixers in the table; a mixer that is not in it keeps its own.
    """
    alone = {(row["mixer"], row["T"]): row["tokens per second"] for row in rows if row["ranks"] == 1}
    table = []
    for row in rows:
        again = "yes" if row["checkpointing"] else "no"
        cells = [f"{row['T']:,}", names.get(row["mixer"], row["mixer"]), str(row["ranks"]), again]
        if row["seconds"] is None:
            table.append([*cells, row["note"], "", ""])
            continue
        one, speed = alone.get((row["mixer"], row["T"])), row["tokens per second"]
        faster = f"{speed / one:.2f}" if one and row["ranks"] > 1 else ""
        peak = f"{row['peak bytes'] / 1e9:.1f}" if row["peak bytes"] else ""
        table.append([*cells, f"{speed:,.0f}", faster, peak])
    header = [
        "tokens of a sequence", "mixer", "GPUs", "blocks checkpointed", "tokens/s", "times faster than one GPU",
        "peak GB of a GPU",
    ]  # fmt: skip
    return markdown_table(header, table)


def parallel_model_table(result: dict[str, Any]) -> str:
    """The table of one result."""
    rows = result["rows"]
    return f"Training steps ({rows[0]['layers']} layers)\n\n{speed_table(rows, {})}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_parallel_model",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one GPU for each process")
    parser.add_argument("--mixers", nargs="+", choices=tuple(LAYOUTS), default=["gka", "attention"])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[32768, 65536, 131072], help="T, of the whole sequence"
    )
    parser.add_argument(
        "--alone", type=int, nargs="*", help="lengths that rank 0 also runs alone, but for qwen3; default: all"
    )
    parser.add_argument("--checkpoint", choices=("always", "alone"), default="always", help="which blocks are")
    add_size_options(parser)
    parser.add_argument("--repeats", type=int, default=5, help="number of timed steps; the median counts")
    parser.add_argument(
        "--output", type=Path, help="JSON file; default: benchmarks/results/parallel_model_MACHINE_DATE.json"
    )
    options = parser.parse_args()
    if options.alone is None:
        options.alone = options.tokens
    if "qwen3" in options.mixers and options.device != "cuda":
        parser.error("--mixers qwen3 needs --device cuda: PyTorch's context_parallel has no kernel for a CPU")
    return options


def main() -> None:
    options = parse()
    with process_group(options.device) as options.device:
        write_by_first("parallel_model", bench(options), options.output)


if __name__ == "__main__":
    main()
