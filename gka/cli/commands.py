"""The commands and their options. Nothing here imports torch: `gka train --help` is instant."""

# ruff: noqa: RUF009  (option() makes a dataclass field)
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import shared_options as shared
from .options import option, read_yaml
from .shared_options import DATA, MACHINE, MODEL, RUN, TRAINING, Device, Dtype, SolverName

OPTIONS_FILE = "options.yaml"
LAYERS_FOLDER, TUNE_FOLDER = "layers", "tune"  # checkpoints of the stages of `gka distill`


class Command(NamedTuple):
    """A command. `options` and `run` are "module:Name"; the module is imported when it is needed."""

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
        "Continue a prompt with a trained model and print the text token by token.",
        "  gka generate runs/first --prompt 'def main('\n"
        "  gka generate runs/first --prompt 'class ' --temperature 0 --max-new-tokens 500\n"
        "  echo 'import os' | gka generate runs/first --prompt - --seed 1",
        "gka.cli.commands:GenerateOptions",
        "gka.cli.generate:main",
    ),
    "serve": Command(
        "Start an OpenAI-compatible HTTP server for a model (`transformers serve`, or vLLM).",
        "  gka serve runs/first\n"
        "  gka serve runs/first --engine vllm -- --max-num-seqs 64    options of `vllm serve` follow --\n"
        "  curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\\n"
        '    -d \'{"prompt": "def main(", "max_tokens": 64, "stream": true}\'',
        "gka.cli.commands:ServeOptions",
        "gka.cli.serve:main",
    ),
    "eval": Command(
        "Measure the bits per byte of a trained model on text files.",
        "  gka eval runs/first                            on the held-out text of the run\n"
        "  gka eval runs/first --data docs/ --per-file\n"
        "  gka eval runs/first --data docs/ --json > score.json",
        "gka.cli.commands:EvalOptions",
        "gka.cli.evaluate:main",
    ),
    "export": Command(
        "Write a checkpoint in another format, with the same weights.",
        "  gka export runs/first out/published            to the published format, hybrid_qwen3\n"
        "  gka export out/published out/own --format gka  back to the format of this library",
        "gka.cli.commands:ExportOptions",
        "gka.cli.export:main",
    ),
    "convert": Command(
        "Replace attention layers of a Llama, Mistral, Qwen2 or Qwen3 model with GKA layers.",
        "  gka convert models/qwen3 --layers 1,3,5 runs/hybrid",
        "gka.cli.convert_options:ConvertOptions",
        "gka.cli.convert:main",
    ),
    "distill": Command(
        "Distill a converted model from its original: first the new layers, then all weights.",
        "  gka distill runs/hybrid --teacher models/qwen3 --data texts/ --output runs/distilled\n"
        "  gka distill --resume --output runs/distilled              resume after an interruption",
        "gka.cli.convert_options:DistillOptions",
        "gka.cli.distill:main",
    ),
    "rank-layers": Command(
        "Rank attention layers by the loss increase when one is replaced.",
        "  gka rank-layers models/qwen3 --data texts/ --output runs/ranked",
        "gka.cli.convert_options:RankOptions",
        "gka.cli.rank_layers:main",
    ),
}


def saved_options(cls: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The saved options of the run to resume; flags and YAML override them. {} for a new run."""
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
        "text files and folders; folders are searched with their subfolders. Default: the source "
        "files of Python's standard library",
        group=DATA,
        metavar="PATH",
    )
    tokenizer: str | None = option(
        None,
        "folder of a Hugging Face tokenizer; default: one token per byte",
        group=DATA,
        metavar="DIR",
    )
    seq_len: int = option(512, "tokens per training sequence", group=DATA, minimum=2)
    validation_fraction: float = option(
        0.05,
        "fraction of the files to hold out for validation, chosen by a hash of the file names. "
        "With a single file, the end of the file is held out",
        group=DATA,
        above=0,
        maximum=0.5,
    )

    family: Literal["gka", "qwen3"] = option(
        "gka",
        "architecture: gka, or qwen3 (the transformers class, softmax attention in every block) "
        "as a baseline or for conversion",
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
    head_dim: int | None = option(None, "head dimension; default: hidden size / heads", group=MODEL, minimum=1)
    mixer: Literal["gka", "gla"] | None = option(
        None,
        "recurrent layer: gka (solves a ridge regression for every token) or gla (gated linear "
        "attention, the same layer without the solve); default: gka",
        group=MODEL,
    )
    attention_layers: list[int] | None = option(
        None,
        "blocks that use softmax attention, counted from 0, e.g. 1,3; default: none",
        group=MODEL,
        minimum=0,
    )
    solver: SolverName | None = shared.solver(MODEL, default="chebyshev")
    solver_steps: list[int] | None = option(
        None,
        "steps of each stage of the solve, e.g. 31 or 16,16; fewer steps are faster and less exact; "
        "default: 31 in float32, 16,16 in bfloat16; with cg 20 and 10,10, with a tolerance 64 and 32,32",
        group=MODEL,
        minimum=1,
        maximum=128,
    )
    tolerance: float | None = shared.tolerance(MODEL, default="all steps are made")
    ridge_ratio: float | None = shared.ridge_ratio(MODEL)
    tie_embeddings: bool = option(False, "use one matrix for the embedding and the output projection", group=MODEL)

    max_steps: int | None = option(
        None,
        "optimiser steps; default: one pass over the data, unless --max-minutes is given",
        group=TRAINING,
        minimum=1,
    )
    max_minutes: float | None = option(
        None,
        "training time in wall-clock minutes, including validation; the learning rate reaches 0 "
        "at the end. With --max-steps too, training ends at the first of the two limits",
        group=TRAINING,
        above=0,
    )
    batch_size: int = shared.batch_size(16)
    accumulation: int = shared.accumulation()
    learning_rate: float = option(1e-3, "peak learning rate of AdamW", group=TRAINING, above=0)
    warmup: float = shared.warmup("fraction of the run with a rising learning rate")
    weight_decay: float = shared.weight_decay(0.1)
    seed: int = option(0, "random seed of the weights and the data order", group=TRAINING, minimum=0)

    device: Device = shared.device()
    dtype: Dtype = shared.dtype_of_activations()
    gradient_checkpointing: bool = option(
        False,
        "recompute activations in the backward pass: uses less memory and about a third more time",
        group=MACHINE,
    )
    loss_chunk: int | None = option(
        None,
        "tokens per chunk of the loss, e.g. 2048: only the logits of one chunk are in memory, computed twice; "
        "default: all tokens of a batch at once",
        group=MACHINE,
        minimum=1,
    )
    compile: bool = option(False, "compile the model with torch.compile (needs a C++ compiler)", group=MACHINE)
    context_parallel: int = option(
        1,
        "processes that share the tokens of every sequence; torchrun starts a multiple of it. --batch-size counts "
        "the sequences that they share",
        group=MACHINE,
        minimum=1,
    )
    tensor_parallel: int = option(
        1,
        "processes that share the heads of every layer, a divisor of the heads; --batch-size counts the sequences "
        "that they share",
        group=MACHINE,
        minimum=1,
    )
    fsdp: bool = option(
        False,
        "split weights, gradients and optimiser over the processes that torchrun starts (FSDP2)",
        group=MACHINE,
    )

    output: str = shared.output("runs/gka")
    resume: bool = option(
        False,
        "resume from the newest checkpoint in the output folder, with the saved options of that run",
        group=RUN,
    )
    overwrite: bool = shared.overwrite()
    log_every: int = shared.log_every()
    eval_every: int = option(
        200, "steps between two validations, which cut the held-out text into sequences", group=RUN, minimum=1
    )
    save_every: int = shared.save_every()
    eval_bytes: int = option(
        200_000,
        "bytes of held-out text per validation; 0 = all. The last validation reads files from their start",
        group=RUN,
        minimum=0,
    )
    prompt: str = option("def main(", "prompt of the sample text at the end; '' = no sample", group=RUN)
    sample_tokens: int = option(256, "length of the sample text in tokens; 0 = no sample", group=RUN, minimum=0)

    @staticmethod
    def saved(given: Mapping[str, Any]) -> dict[str, Any]:
        """The saved options of the run to resume; see `saved_options`."""
        return saved_options(TrainOptions, given)


_SAMPLING = "sampling"


@dataclass
class GenerateOptions:
    """Options of `gka generate`."""

    checkpoint: str = shared.trained_model()
    prompt: str = option("", "text to continue; - reads standard input", group=_SAMPLING)
    max_new_tokens: int = option(256, "maximum number of tokens to generate", group=_SAMPLING, minimum=1)
    temperature: float = option(
        0.8,
        "sampling temperature; a value below 1 favours likely tokens, 0 always picks the likeliest",
        group=_SAMPLING,
        minimum=0,
    )
    top_p: float = option(
        0.95,
        "probability mass for nucleus sampling: sample from the likeliest tokens with this total probability",
        group=_SAMPLING,
        above=0,
        maximum=1,
    )
    seed: int | None = option(None, "random seed; the same seed gives the same text", group=_SAMPLING, minimum=0)
    device: Device = shared.device()
    dtype: Dtype = shared.dtype_of_weights()
    compile: bool = shared.compile_steps()
    solver: SolverName | None = shared.solver(MACHINE, default="that of the checkpoint")
    solver_steps: list[int] | None = shared.solver_steps_of_checkpoint()
    tolerance: float | None = shared.tolerance(MACHINE, default="that of the checkpoint")


_SERVER = "server"


@dataclass
class ServeOptions:
    """Options of `gka serve`."""

    checkpoint: str = shared.trained_model()
    engine: Literal["transformers", "vllm"] = option(
        "transformers",
        "server to run: transformers answers one request after the other; vllm, which must be installed, answers "
        "many at a time, and takes more options after --",
        group=_SERVER,
    )
    name: str | None = option(
        None,
        "name of the model in requests; default: the name of the run folder or checkpoint folder",
        group=_SERVER,
    )
    host: str = option(
        "localhost", "address to listen on; 0.0.0.0 means all addresses of this machine", group=_SERVER
    )
    port: int = option(8000, "port to listen on", group=_SERVER, minimum=1, maximum=65535)
    default_seed: int | None = option(
        None,
        "random seed for sampling, set once at the start; a request can set its own seed",
        group=_SERVER,
        minimum=0,
    )
    device: Device = shared.device()
    dtype: Dtype = shared.dtype_of_weights()
    compile: bool = shared.compile_steps()
    further: list[str] = field(default_factory=list, init=False)  # the arguments after --


_REPORT = "report"


@dataclass
class EvalOptions:
    """Options of `gka eval`."""

    checkpoint: str = shared.trained_model()
    data: list[str] | None = option(
        None,
        "text files and folders; default: the held-out text of the training run",
        group=DATA,
        metavar="PATH",
    )
    max_bytes: int = option(0, "approximate maximum number of bytes to read; 0 = all", group=DATA, minimum=0)
    window: int = option(
        1024,
        "tokens per forward pass; the state is carried from window to window, so the value "
        "changes the memory use and not the result",
        group=MACHINE,
        minimum=1,
    )
    batch_size: int = option(8, "number of files to read at the same time", group=MACHINE, minimum=1)
    device: Device = shared.device()
    dtype: Dtype = shared.dtype_of_weights()
    solver: SolverName | None = shared.solver(MACHINE, default="that of the checkpoint")
    solver_steps: list[int] | None = shared.solver_steps_of_checkpoint()
    tolerance: float | None = shared.tolerance(MACHINE, default="that of the checkpoint")
    per_file: bool = option(False, "print one line per file", group=_REPORT)
    json: bool = option(False, "print JSON instead of text", group=_REPORT)


@dataclass
class ExportOptions:
    """Options of `gka export`."""

    checkpoint: str = option(MISSING, "folder of a model or of a training run", positional=True)
    output: str = option(MISSING, "folder to write; must be empty or must not exist", positional=True)
    format: Literal["hybrid_qwen3", "gka"] = option(
        "hybrid_qwen3", "format to write: hybrid_qwen3 is the published format, gka the format of this library"
    )
    num_iter: int | None = option(
        None,
        "number of solver iterations to write (published format only); default: the value of the model, if its "
        "solver has one stage",
        minimum=1,
        maximum=1000,
    )
    shard_mb: float = option(5000, "maximum size of a weights file in megabytes", above=0)
