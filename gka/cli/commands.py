"""The commands and their options. Nothing here imports torch: `gka train --help` is instant."""

# ruff: noqa: RUF009  (option() makes a dataclass field)
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import shared_options as shared
from .options import option, read_yaml
from .shared_options import DATA, MACHINE, MODEL, RUN, TRAINING, Device, Dtype

OPTIONS_FILE = "options.yaml"


class Command(NamedTuple):
    """A command: "module:Name" of its options and of the function that runs it, loaded when needed."""

    summary: str
    examples: str
    options: str
    run: str


COMMANDS = {
    "train": Command(
        "Train a Gated KalmaNet language model on text files.",
        "  gka train --max-minutes 3 --output runs/first          on the Python standard library\n"
        "  gka train --data notes/ book.txt --max-steps 2000 --output runs/mine\n"
        "  gka train --resume --output runs/mine                  resume after an interruption\n"
        "  torchrun --nproc_per_node 2 -m gka train --data src/   two processes, or two GPUs",
        "gka.cli.commands:TrainOptions",
        "gka.cli.train:main",
    ),
    "generate": Command(
        "Continue a prompt with a trained model; the text appears as it is made.",
        "  gka generate runs/first --prompt 'def main('\n"
        "  gka generate runs/first --prompt 'class ' --temperature 0 --max-new-tokens 500\n"
        "  echo 'import os' | gka generate runs/first --prompt - --seed 1",
        "gka.cli.commands:GenerateOptions",
        "gka.cli.generate:main",
    ),
    "serve": Command(
        "Serve a model over HTTP, with the OpenAI interface, by the code of `transformers serve`.",
        "  gka serve runs/first\n"
        "  curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\\n"
        '    -d \'{"prompt": "def main(", "max_tokens": 64, "stream": true}\'',
        "gka.cli.commands:ServeOptions",
        "gka.cli.serve:main",
    ),
    "eval": Command(
        "Measure the bits per byte of a trained model on any text files.",
        "  gka eval runs/first                            on the held-out text of its run\n"
        "  gka eval runs/first --data docs/ --per-file\n"
        "  gka eval runs/first --data docs/ --json > score.json",
        "gka.cli.commands:EvalOptions",
        "gka.cli.evaluate:main",
    ),
    "export": Command(
        "Write a checkpoint in another format, its weights bit for bit.",
        "  gka export runs/first out/published            in the published format, hybrid_qwen3\n"
        "  gka export out/published out/own --format gka  and back",
        "gka.cli.commands:ExportOptions",
        "gka.cli.export:main",
    ),
    "convert": Command(
        "Replace attention layers of a Llama, Mistral, Qwen2 or Qwen3 by GKA layers.",
        "  gka convert models/qwen3 --layers 1,3,5 runs/hybrid",
        "gka.cli.convert_options:ConvertOptions",
        "gka.cli.convert:main",
    ),
    "distill": Command(
        "Teach a converted model: its new layers first, then the whole of it.",
        "  gka distill runs/hybrid --teacher models/qwen3 --data texts/ --output runs/distilled\n"
        "  gka distill --resume --output runs/distilled              go on after an interruption",
        "gka.cli.convert_options:DistillOptions",
        "gka.cli.distill:main",
    ),
    "rank-layers": Command(
        "Measure which attention layers cost least to replace.",
        "  gka rank-layers models/qwen3 --data texts/ --output runs/ranked",
        "gka.cli.convert_options:RankOptions",
        "gka.cli.rank_layers:main",
    ),
}


def saved_options(cls: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the run to resume, which stand below flags and YAML; {} for a new run."""
    if not given.get("resume"):
        return {}
    default = cls.__dataclass_fields__["output"].default
    path = Path(given.get("output", default)).expanduser() / OPTIONS_FILE
    values = read_yaml(path, cls) if path.exists() else {}
    return {name: value for name, value in values.items() if name not in ("resume", "overwrite")}


@dataclass
class TrainOptions:
    """Options of `gka train`."""

    data: list[str] | None = option(
        None,
        "text files and folders; every text file in a folder and its subfolders is read. "
        "Default: the sources of this Python's standard library",
        group=DATA,
        metavar="PATH",
    )
    tokenizer: str | None = option(
        None,
        "folder of a Hugging Face tokenizer; default: tokens are bytes",
        group=DATA,
        metavar="DIR",
    )
    seq_len: int = option(512, "tokens per training sequence", group=DATA, minimum=2)
    validation_fraction: float = option(
        0.05,
        "share of the files that is held out for validation, chosen by a hash of their names. "
        "From a single file, its end is held out",
        group=DATA,
        above=0,
        maximum=0.5,
    )

    family: Literal["gka", "qwen3"] = option(
        "gka",
        "architecture: gka, or qwen3, transformers' own class with softmax attention in every block, to "
        "compare with or to convert",
        group=MODEL,
    )
    hidden_size: int = option(256, "width of the residual stream", group=MODEL, minimum=1)
    intermediate_size: int | None = option(
        None, "width of the feed-forward blocks; default: 8/3 of the hidden size", group=MODEL, minimum=1
    )
    layers: int = option(4, "number of blocks", group=MODEL, minimum=1)
    heads: int = option(4, "query heads", group=MODEL, minimum=1)
    kv_heads: int | None = option(
        None, "key and value heads, a divisor of the query heads; default: the same", group=MODEL, minimum=1
    )
    head_dim: int | None = option(None, "dim of a head; default: hidden size / heads", group=MODEL, minimum=1)
    mixer: Literal["gka", "gla"] | None = option(
        None,
        "recurrent layer: gka solves a ridge regression for every token, gla (gated linear attention) is "
        "the same layer without the solve; default: gka",
        group=MODEL,
    )
    attention_layers: list[int] | None = option(
        None,
        "blocks with softmax attention instead, counted from 0, e.g. 1,3; default: none",
        group=MODEL,
        minimum=0,
    )
    solver_steps: list[int] | None = option(
        None,
        "Chebyshev steps of the solve, per stage, e.g. 31 or 16,16; fewer is faster and less exact; "
        "default: 31 in float32, 16,16 in bfloat16",
        group=MODEL,
        minimum=1,
        maximum=128,
    )
    ridge_ratio: float | None = shared.ridge_ratio(MODEL)
    tie_embeddings: bool = option(
        False, "share one matrix between the embedding and the output projection", group=MODEL
    )

    max_steps: int | None = option(
        None,
        "optimiser steps; default: one pass over the data, unless --max-minutes is given",
        group=TRAINING,
        minimum=1,
    )
    max_minutes: float | None = option(
        None,
        "wall-clock minutes of training, validation included; the learning rate reaches 0 at their end. "
        "With --max-steps, training ends at whichever comes first",
        group=TRAINING,
        above=0,
    )
    batch_size: int = shared.batch_size(16)
    accumulation: int = shared.accumulation()
    learning_rate: float = option(1e-3, "peak learning rate of AdamW", group=TRAINING, above=0)
    warmup: float = shared.warmup("share of the run in which the learning rate rises")
    weight_decay: float = shared.weight_decay(0.1)
    seed: int = option(0, "random seed of the weights and the order of the data", group=TRAINING, minimum=0)

    device: Device = shared.device()
    dtype: Dtype = shared.dtype_of_activations()
    gradient_checkpointing: bool = option(
        False,
        "recompute activations in the backward pass: less memory, about a third more time",
        group=MACHINE,
    )
    compile: bool = option(False, "compile the model by torch.compile (needs a C++ compiler)", group=MACHINE)

    output: str = shared.output("runs/gka")
    resume: bool = option(
        False,
        "resume from the newest checkpoint in the output folder, with the options of that run",
        group=RUN,
    )
    overwrite: bool = shared.overwrite()
    log_every: int = shared.log_every()
    eval_every: int = option(200, "steps between two validations", group=RUN, minimum=1)
    save_every: int = shared.save_every()
    eval_bytes: int = option(
        200_000, "bytes of held-out text that each validation reads; 0 = all", group=RUN, minimum=0
    )
    prompt: str = option("def main(", "text that the trained model continues at the end; '' = none", group=RUN)
    sample_tokens: int = option(256, "tokens of that continuation; 0 = none", group=RUN, minimum=0)

    @staticmethod
    def saved(given: Mapping[str, Any]) -> dict[str, Any]:
        """Options of the run to resume, which stand below flags and YAML; {} for a new run."""
        return saved_options(TrainOptions, given)


_SAMPLING = "sampling"


@dataclass
class GenerateOptions:
    """Options of `gka generate`."""

    checkpoint: str = shared.trained_model()
    prompt: str = option("", "text to continue; - reads it from standard input", group=_SAMPLING)
    max_new_tokens: int = option(256, "largest number of tokens to generate", group=_SAMPLING, minimum=1)
    temperature: float = option(
        0.8,
        "sampling temperature; below 1 prefers likelier tokens, 0 always takes the likeliest",
        group=_SAMPLING,
        minimum=0,
    )
    top_p: float = option(
        0.95,
        "share of the probability; tokens are sampled from the likeliest that hold it",
        group=_SAMPLING,
        above=0,
        maximum=1,
    )
    seed: int | None = option(None, "random seed; the same seed gives the same text", group=_SAMPLING, minimum=0)
    device: Device = shared.device()
    dtype: Dtype = shared.dtype_of_weights()
    solver_steps: list[int] | None = shared.solver_steps_of_checkpoint()


_SERVER = "server"


@dataclass
class ServeOptions:
    """Options of `gka serve`."""

    checkpoint: str = shared.trained_model()
    name: str | None = option(
        None,
        "name of the model in requests; default: the name of the run's or checkpoint's folder",
        group=_SERVER,
    )
    host: str = option(
        "localhost", "address to listen on; 0.0.0.0 means every address of this machine", group=_SERVER
    )
    port: int = option(8000, "port to listen on", group=_SERVER, minimum=1, maximum=65535)
    default_seed: int | None = option(
        None,
        "random seed of the sampling, set once at the start; a request may set its own",
        group=_SERVER,
        minimum=0,
    )
    device: Device = shared.device()
    dtype: Dtype = shared.dtype_of_weights()


_REPORT = "report"


@dataclass
class EvalOptions:
    """Options of `gka eval`."""

    checkpoint: str = shared.trained_model()
    data: list[str] | None = option(
        None,
        "text files and folders; default: the held-out text of the run that made the model",
        group=DATA,
        metavar="PATH",
    )
    max_bytes: int = option(0, "approximate limit of the bytes read; 0 = all", group=DATA, minimum=0)
    window: int = option(
        1024,
        "tokens per forward pass; the state is carried from window to window, so this changes memory, "
        "not the result",
        group=MACHINE,
        minimum=1,
    )
    batch_size: int = option(8, "files read at the same time", group=MACHINE, minimum=1)
    device: Device = shared.device()
    dtype: Dtype = shared.dtype_of_weights()
    solver_steps: list[int] | None = shared.solver_steps_of_checkpoint()
    per_file: bool = option(False, "print a line for every file", group=_REPORT)
    json: bool = option(False, "print JSON instead of text", group=_REPORT)


@dataclass
class ExportOptions:
    """Options of `gka export`."""

    checkpoint: str = option(MISSING, "folder of a model, or of the run that made it", positional=True)
    output: str = option(MISSING, "folder to write; it must be empty or not exist", positional=True)
    format: Literal["hybrid_qwen3", "gka"] = option(
        "hybrid_qwen3", "format to write: the published one, or this library's own"
    )
    num_iter: int | None = option(
        None,
        "iterations to write into the published format; default: the model's, if its solver has one stage",
        minimum=1,
        maximum=1000,
    )
    shard_mb: float = option(5000, "largest size of a weights file in megabytes", above=0)
