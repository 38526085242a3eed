"""Training speed and memory of whole models that differ in their mixer alone.

    python -m benchmarks.bench_model --device cuda                                  # eager and graph
    python -m benchmarks.bench_model --device cuda --modes compiled                 # minutes of compilation
    python -m benchmarks.bench_model --device cuda --batch 16 --loss-chunk 2048 --modes eager
    python -m benchmarks.bench_model --layers 2 --hidden 32 --heads 2 --head-dim 16 --vocabulary 100 --batch 2 \\
        --length 64

A step is: gradients to None, forward pass under autocast, backward pass, optimiser. All mixers stand in the same
blocks, those of configs/440m.yaml. They run one after another in this process, each alone on the device.

    gka              GatedKalmaNet
    Gated DeltaNet   the layer of flash-linear-attention, if it can be imported and the device is a GPU
    attention        softmax attention, by scaled_dot_product_attention

    tokens/s         batch x length / step, where the step is the median of steps queued one behind another
    host             time until a step is queued, from an empty queue
    GPU              sum of the times of all kernels in a step, from one profiled step
    MFU              flops / (step x peak), as `experiments/evidence/mfu.py` counts flops
    peak             largest allocated memory, with weights, gradients and the optimiser's state

Modes: eager; compiled (torch.compile of the whole model); graph (a whole step captured in a CUDA graph).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gka
from benchmarks.calls import allow_fla_backward, fla_is_missing, gpu_seconds
from benchmarks.common import write_result
from benchmarks.recipes import add_size_options, config_of
from experiments.evidence.mfu import peak_of, step_flops
from experiments.evidence.table import markdown_table
from gka.hf import Mixer, register_mixer

Step = Callable[[], object]
RECIPE = "440m"
MIXERS = ("gka", "Gated DeltaNet", "attention")
MODES = ("eager", "compiled", "graph")


class DeltaNet(Mixer):
    """Gated DeltaNet of flash-linear-attention."""

    def __init__(self, config: gka.GKAConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        from fla.layers import GatedDeltaNet

        self.inner = GatedDeltaNet(
            hidden_size=config.hidden_size, num_heads=config.num_attention_heads, head_dim=config.head_dim,
            expand_v=1, use_gate=True, use_short_conv=True, layer_idx=layer_idx,
        )  # fmt: skip

    def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
        """[B, T, hidden_size] -> the same; without mask and cache."""
        out: Tensor = self.inner(hidden_states)[0]
        return out


def reason_without_delta_net(device: torch.device) -> str:
    """Why flash-linear-attention cannot be measured; "" if it can."""
    missing = fla_is_missing(device)
    if missing:
        return missing
    try:
        import fla.layers  # noqa: F401
    except Exception as error:  # it reads the names of many versions of other packages
        return f"flash-linear-attention cannot be imported ({type(error).__name__}: {error})"
    return ""


def config_with(mixer: str, options: argparse.Namespace) -> gka.GKAConfig:
    """The recipe with a mixer, which may be that of flash-linear-attention."""
    if mixer != "Gated DeltaNet":
        return config_of(RECIPE, mixer, options)
    register_mixer("fla_gated_delta_net", DeltaNet)
    return config_of(RECIPE, mixer, options, mixer="fla_gated_delta_net")


def training_step(model: nn.Module, options: argparse.Namespace, mode: str) -> Step:
    """A step on the same random tokens."""
    device = options.device
    tokens = torch.randint(0, options.vocabulary, (options.batch, options.length), device=device)
    if options.optimizer == "adamw":
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=mode == "graph")
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    called: Any = torch.compile(model) if mode == "compiled" else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(
            device.type, torch.bfloat16, enabled=options.dtype == "bfloat16", cache_enabled=mode != "graph"
        ):
            loss = called(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()

    return step


def captured(step: Step) -> Step:
    """The step in a CUDA graph, after three steps that compile its kernels and fill the optimiser's state."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def queued_seconds(step: Step, device: torch.device, repeats: int) -> list[float]:
    """Seconds of each step; on a GPU the host runs ahead as in training."""
    if device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(repeats):
            step()
            times.append(time.perf_counter())
        return [end - begin for begin, end in pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(events)]


def host_seconds(step: Step, repeats: int) -> float:
    """Median seconds until a step is queued on a GPU that has nothing to do."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(times)


def measure(model: nn.Module, options: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Times and memory of a model in a mode."""
    device, on_gpu = options.device, options.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    step = training_step(model, options, mode)
    if mode == "graph":
        step = captured(step)
    step()
    if on_gpu:
        torch.cuda.synchronize()
    found: dict[str, Any] = {"first call": time.perf_counter() - begin}
    for _ in range(options.warm_up):
        step()
    times = queued_seconds(step, device, options.repeats)
    median = statistics.median(times)
    found["seconds"] = {"median": median, "least": min(times), "largest": max(times)}
    found["tokens per second"] = options.batch * options.length / median
    found["host seconds"] = host_seconds(step, options.repeats) if on_gpu else None
    found["peak bytes"] = torch.cuda.max_memory_allocated() if on_gpu else None
    found["gpu seconds"] = sum(gpu_seconds(step).values()) if on_gpu else None
    return found


def peak_flops(options: argparse.Namespace) -> float | None:
    """Peak of the device in flops per second; None if it is not known, or not that of the dtype."""
    if options.peak_tflops is not None:
        return float(options.peak_tflops) * 1e12
    if options.device.type != "cuda" or options.dtype != "bfloat16":
        return None
    return peak_of(torch.cuda.get_device_name(options.device))


def run(mixer: str, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a mixer in a mode; without memory, or without a capture, a note."""
    torch.manual_seed(0)
    model = gka.GKAForCausalLM(config_with(mixer, options)).train().to(options.device)
    model.set_loss_chunk(options.loss_chunk)
    flops = step_flops(model, mixer, options.batch, options.length, getattr(torch, options.dtype))
    peak = peak_flops(options)
    found: dict[str, Any] = {"parameters": model.num_parameters(), "flops": flops, "peak flops": peak}
    try:
        found |= measure(model, options, mode)
        found["mfu"] = None if peak is None else flops / found["seconds"]["median"] / peak
    except torch.OutOfMemoryError:
        found |= {"seconds": None, "note": "out of memory"}
    except RuntimeError as error:
        if mode != "graph":
            raise
        found |= {"seconds": None, "note": f"the capture failed: {str(error).splitlines()[0]}"}
    return found


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    missing, note = "", ""
    if "Gated DeltaNet" in options.mixers:
        missing = reason_without_delta_net(options.device)
        note = "" if missing else allow_fla_backward()
    layers = config_of(RECIPE, "gka", options).num_hidden_layers
    sizes = {"B": options.batch, "T": options.length, "layers": layers, "vocabulary": options.vocabulary}
    for mode in options.modes:
        for mixer in options.mixers:
            row = {"part": "model", "mode": mode, "mixer": mixer, **sizes, "loss chunk": options.loss_chunk}
            row |= {"dtype": options.dtype, "optimizer": options.optimizer}
            if mixer == "Gated DeltaNet" and missing:
                row |= {"seconds": None, "note": f"not measured, {missing}"}
            else:
                row |= {"note": note} if mixer == "Gated DeltaNet" and note else {}
                row |= run(mixer, mode, options)
                gc.collect()  # modules and their gradients are circles
                torch.compiler.reset()
                if options.device.type == "cuda":
                    torch.cuda.empty_cache()
            print(line(row), flush=True)
            yield row


def line(row: dict[str, Any]) -> str:
    """A row for the screen."""
    cells = ", ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, figures(row), strict=True) if cell)
    return f"{row['mode']:9s} {row['mixer']:15s} {cells} {row.get('note', '')}"


COLUMNS = ("tokens/s", "step, ms", "GPU, ms", "host, ms", "MFU", "peak GB", "first step, s")


def figures(row: dict[str, Any]) -> list[str]:
    """The cells of a row under COLUMNS; "" for what was not measured."""
    if row["seconds"] is None:
        return [""] * len(COLUMNS)

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    gpu, host, peak = row["gpu seconds"], row["host seconds"], row["peak bytes"]
    return [
        f"{row['tokens per second']:,.0f}",
        f"{row['seconds']['median'] * 1e3:.1f}",
        cell(gpu and gpu * 1e3, ".1f"),
        cell(host and host * 1e3, ".1f"),
        cell(row["mfu"], ".3f"),
        cell(peak and peak / 1e9, ".1f"),
        f"{row['first call']:.1f}",
    ]


def model_table(result: dict[str, Any]) -> str:
    """The figures of all mixers and modes."""
    rows = result["rows"]
    first = rows[0]
    table = []
    for row in rows:
        cells = figures(row) if row["seconds"] else ["not run", *[""] * (len(COLUMNS) - 1)]
        table.append(
            [row["mode"], row["mixer"], f"{row['parameters'] / 1e6:.0f}" if "parameters" in row else "", *cells]
        )
    peak = next((row["peak flops"] for row in rows if row.get("peak flops")), None)
    chunk = "" if first["loss chunk"] is None else f", the loss in chunks of {first['loss chunk']} tokens"
    shape = (
        f"{first['layers']} layers, B {first['B']}, T {first['T']}, vocabulary {first['vocabulary']}, "
        f"autocast {first['dtype']}, {first['optimizer']}{chunk}"
    )
    text = f"A training step of whole models ({shape})\n\n" + markdown_table(
        ["mode", "mixer", "million parameters", *COLUMNS], table
    )
    if peak:
        text += (
            f"\n\nMFU: of {peak / 1e12:.0f} TFLOP/s. A step counts three times the flops of the forward pass: 2 "
            "for each weight of a linear map and token, and those of the mixer's op "
            "(`gka.ops.flops.forward_flops`; attention 2 T H D a token, Gated DeltaNet 6 H D^2). "
            "Compare mixers by tokens/s: the solve is work of gka alone."
        )
    notes = dict.fromkeys(f"{row['mixer']}, {row['mode']}: {row['note']}." for row in rows if "note" in row)
    return "\n\n".join([text, *notes])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_model", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=MIXERS)
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: eager, on a GPU also graph")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    add_size_options(parser)
    parser.add_argument("--loss-chunk", type=int, help="tokens per chunk of the loss; default: all at once")
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help="adamw is the fused one")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of autocast")
    parser.add_argument(
        "--peak-tflops", type=float, help="peak of the device; default: that of bfloat16, if known"
    )
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the timed ones")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps; the median counts")
    parser.add_argument(
        "--output", type=Path, help="JSON file; default: benchmarks/results/model_MACHINE_DATE.json"
    )
    options = parser.parse_args(arguments)
    if options.modes is None:
        options.modes = ("eager", "graph") if options.device.type == "cuda" else ("eager",)
    if "graph" in options.modes and options.device.type != "cuda":
        parser.error("--modes graph needs --device cuda")
    return options


def main() -> None:
    options = parse()
    command = " ".join(["python -m benchmarks.bench_model", *sys.argv[1:]])
    write_result("model", bench(options), command, options.output)


if __name__ == "__main__":
    main()
