"""Time and memory against length for every mixer: forward, forward and backward, and a step of decoding.

The experiment measures one block (mixer and feed-forward) with the width of the language models, on one sequence
of random input. Forward + backward computes the gradients of the input and of all parameters. A decode step
processes one token after T others; the cache of those T tokens is made before and not timed. On a GPU all tensors
are bfloat16, and memory is the peak above parameters and input. On a CPU all tensors are float32, and memory is
not measured.

Gated DeltaNet uses the kernels of flash-linear-attention and Mamba-2 those of mamba_ssm, if these packages are
installed. Otherwise they run in the PyTorch code of transformers, which says little about their possible speed.
MesaNet is a layer of flash-linear-attention.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from gka.cli.generate import ready_attention
from gka.hf.model import GKAModel

from ..peers import GPU_MIXERS, MIXERS
from ..tasks.mqar_report import STYLE
from .picture import new_panels, save
from .record import Cell
from .skeleton import skeleton
from .table import markdown_table
from .timing import seconds

SUMMARY = "time and memory against length"
BY_MACHINE = True
WHAT = ("forward", "forward+backward", "decode step")
Entries = list[dict[str, Any]]
ALL = (*MIXERS, *GPU_MIXERS)
_WIDE = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6}
_NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
_LIMIT = 60.0  # seconds per call; slower calls are measured once
_QUICK = 0.02  # seconds per call; faster calls are measured more often
_CALLS, _MORE_CALLS = 5, 50


def cells(size: str) -> list[Cell]:
    """Full: 1K to 1M tokens. Small: 256 and 512 tokens of a narrow block, without mixers that need a GPU.

    MesaNet has no decode step here, since it takes no cache of transformers.
    """
    small = size == "small"
    lengths, sizes = ([256, 512], _NARROW) if small else ([1 << n for n in range(10, 21)], _WIDE)
    mixers = MIXERS if small else ALL
    return [
        {"mixer": mixer, "what": what, "tokens": T, **sizes}
        for T, what, mixer in itertools.product(lengths, WHAT, mixers)
        if (mixer, what) != ("mesa", "decode step")
    ]


def run(cell: Cell, folder: Path, device: torch.device) -> Any:
    """Median, smallest and largest seconds, peak bytes, bytes of the cache, and the implementation of the mixer.

    Seconds and bytes are None if the memory is too small.
    """
    fields = {name: cell[name] for name in _WIDE}
    config = skeleton(
        cell["mixer"], vocab_size=8192, num_hidden_layers=1, max_position_embeddings=1 << 20, **fields
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = GKAModel(config).eval()
    model.to(device=device, dtype=dtype)  # type: ignore[call-overload]
    x = torch.randn(1, cell["tokens"], config.hidden_size, device=device, dtype=dtype)
    try:
        found = _measure(model, x, cell["what"])
    except torch.OutOfMemoryError:
        found = {"seconds": None, "peak bytes": None}
    return {**found, "by": _implementation(cell["mixer"], device)}


def _measure(model: GKAModel, x: Tensor, what: str) -> dict[str, Any]:
    model.train(what == "forward+backward")  # some layers have separate kernels for decoding
    if what == "decode step":
        call, held = _step(model, x)
    else:
        call, held = _whole(model, x, backward=what == "forward+backward"), {}
    before = _reset_peak(x)
    times = [seconds(call, x.device)]
    if times[0] <= _LIMIT:
        before = _reset_peak(x)  # kernels with autotuning need more memory in the first call
        times = [seconds(call, x.device) for _ in range(_CALLS)]
        if statistics.median(times) < _QUICK:  # the first calls may have been slow
            times = [seconds(call, x.device) for _ in range(_MORE_CALLS)]
    peak = torch.cuda.max_memory_allocated() - before if x.is_cuda and not held else None
    return {"seconds": [statistics.median(times), min(times), max(times)], "peak bytes": peak, **held}


def _reset_peak(x: Tensor) -> int:
    """Reset the peak and return the bytes in use now; 0 on a CPU."""
    if not x.is_cuda:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _whole(model: GKAModel, x: Tensor, backward: bool) -> Callable[[], object]:
    leaves = [x.requires_grad_(), *(p for name, p in model.named_parameters() if "embed" not in name)]
    cotangent = torch.randn_like(x) if backward else None

    def call() -> object:
        with torch.set_grad_enabled(backward):
            y = model(inputs_embeds=x, use_cache=False).last_hidden_state
        return torch.autograd.grad(y, leaves, cotangent) if backward else y

    return call


def _step(model: GKAModel, x: Tensor) -> tuple[Callable[[], object], dict[str, Any]]:
    """A function that decodes one more token after x at every call, and the size of the cache before the first."""
    cache = DynamicCache(config=model.config)
    token = x[:, :1].clone()
    with torch.no_grad():
        model(inputs_embeds=x, past_key_values=cache, use_cache=True)

    def call() -> object:
        with torch.no_grad(), ready_attention():
            return model(inputs_embeds=token, past_key_values=cache, use_cache=True)

    return call, {"cache bytes": _bytes(cache)}


def _bytes(cache: DynamicCache) -> int:
    """The size of the cache."""
    held: list[Any] = []
    for layer in cache.layers:
        for name in ("conv_states", "recurrent_states"):
            held += getattr(layer, name, {}).values()
        held += [getattr(layer, "keys", None), getattr(layer, "values", None)]
    return sum(x.nbytes for x in held if isinstance(x, Tensor))


def _implementation(mixer: str, device: torch.device) -> str:
    package = {"gdn": "fla", "mamba2": "mamba_ssm", "mesa": "fla"}.get(mixer)
    if package is not None:
        installed = device.type == "cuda" and importlib.util.find_spec(package) is not None
        return package if installed else "transformers' PyTorch code"
    return "gka" if mixer in ("gka", "gla") else "PyTorch's scaled_dot_product_attention"


def section(entries: Entries, picture: Path) -> str:
    """A table of milliseconds and a table of memory; the picture has one panel per quantity."""
    mixers = [mixer for mixer in ALL if any(e["cell"]["mixer"] == mixer for e in entries)]
    _draw(entries, mixers, picture)
    head = ["what", "tokens", *(STYLE[mixer][0] for mixer in mixers)]
    times, memory = [], []
    for what, T in itertools.product(WHAT, sorted({e["cell"]["tokens"] for e in entries})):
        found = {
            e["cell"]["mixer"]: e["result"]
            for e in entries
            if (e["cell"]["what"], e["cell"]["tokens"]) == (what, T)
        }
        if found:
            results = [found.get(mixer) for mixer in mixers]
            times.append([what, str(T), *map(_time, results)])
            if any(map(_memory, results)):
                memory.append([what, str(T), *map(_memory, results)])
    ways = {STYLE[e["cell"]["mixer"]][0]: e["result"]["by"] for e in entries}
    sizes = entries[0]["cell"]
    return "\n\n".join(
        (
            "How do time and memory grow with the length? The experiment measures one block with hidden size "
            f"{sizes['hidden_size']} and {sizes['num_attention_heads']} heads, on one sequence. Implementations: "
            f"{'; '.join(f'{mixer}, {by}' for mixer, by in ways.items())}.",
            f"Milliseconds: median of {_CALLS} calls, or of {_MORE_CALLS} calls if one call takes less than "
            f"{1e3 * _QUICK:g} ms. Times of "
            "a few milliseconds are mostly Python and kernel launches, and they vary. A decode step of "
            "softmax attention uses the DynamicCache of transformers, which copies all keys and values to append "
            "one. It does not use cuDNN, the default of PyTorch on a Hopper GPU, because cuDNN makes a new plan "
            "for every new length.",
            markdown_table(head, times),
            "Megabytes: peak memory above parameters and input; for a decode step, the size of the cache.",
            markdown_table(head, memory),
            _findings(entries),
        )
    )


def _time(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    return "out of memory" if result["seconds"] is None else f"{result['seconds'][0] * 1e3:.4g}"


def _memory(result: dict[str, Any] | None) -> str:
    value = None if result is None else _bytes_of(result)
    return "" if value is None else f"{value / 1e6:.4g}"


def _bytes_of(result: dict[str, Any]) -> int | None:
    """The size of the cache if there is one, otherwise the peak."""
    value: int | None = result.get("cache bytes", result["peak bytes"])
    return value


def _findings(entries: Entries) -> str:
    """The growth of the times of GKA and attention up to the last length, and of GKA's cache."""
    parts = []
    for what, mixer in itertools.product(WHAT[:2], ("gka", "attention")):
        points = points_of(entries, mixer, what)[-2:]
        if len(points) == 2:
            (T, before), (last, after) = points
            parts.append(
                f"{what}: {last:,} tokens take {STYLE[mixer][0]} {after / before:.3g} times as long as {T:,}"
            )
    caches = {
        e["result"]["cache bytes"]
        for e in entries
        if e["cell"]["mixer"] == "gka" and e["result"].get("cache bytes")
    }
    if len(caches) == 1:
        parts.append(f"the cache of a GKA block has {caches.pop():,} bytes at every length")
    elif caches:
        parts.append(f"the cache of a GKA block grows from {min(caches):,} to {max(caches):,} bytes")
    if not parts:
        return ""
    return (
        f"Expected for GKA: linear time and constant decoding memory. Measured: {'; '.join(parts)}. The "
        "paper shows the throughput of whole models on other hardware; this experiment measures one block."
    )


def points_of(entries: Entries, mixer: str, what: str, memory: bool = False) -> list[tuple[int, float]]:
    """Tokens and median seconds (or bytes), without cells that ran out of memory or were not measured."""
    found = []
    for entry in entries:
        if (entry["cell"]["mixer"], entry["cell"]["what"]) == (mixer, what):
            times = entry["result"]["seconds"]
            value = _bytes_of(entry["result"]) if memory else times and times[0]
            if value:
                found.append((entry["cell"]["tokens"], float(value)))
    return sorted(found)


def _draw(entries: Entries, mixers: list[str], path: Path) -> None:
    """Milliseconds in the upper row, megabytes in the lower row if they were measured."""
    kinds = [("milliseconds", False, 1e3)]
    if any(e["result"]["peak bytes"] for e in entries):
        kinds.append(("megabytes", True, 1e-6))
    figure, panels = new_panels(len(kinds), len(WHAT), (13, 4.2 * len(kinds)), 120)
    for number, (unit, memory, scale) in enumerate(kinds):
        row = panels[number * len(WHAT) : (number + 1) * len(WHAT)]
        for axes, what in zip(row, WHAT, strict=True):
            for mixer in mixers:
                name, colour, marker = STYLE[mixer]
                points = [(T, scale * value) for T, value in points_of(entries, mixer, what, memory)]
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, label=name)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            middle = math.sqrt(low * high)  # random differences shall not fill the panel
            axes.set_ylim(min(low, middle / 10), max(high, middle * 10))
            axes.set_xlabel("tokens" if what != "decode step" else "tokens before it")
            axes.set_title(what, loc="left", fontsize=11)
        row[0].set_ylabel(unit)
    panels[0].legend(frameon=False, fontsize=8)
    save(figure, path)
