"""Options of `gka convert`, `gka distill` and `gka rank-layers`. Nothing here imports torch."""

# ruff: noqa: RUF009  (option() makes a dataclass field)
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal

from . import shared_options as shared
from .commands import saved_options
from .options import option
from .shared_options import DATA, LAYERS, MACHINE, RUN, TRAINING, Device, Dtype, SolverName


@dataclass
class ConvertOptions:
    """Options of `gka convert`."""

    model: str = option(MISSING, "folder of a Llama, Mistral, Qwen2, Qwen3 or hybrid model", positional=True)
    out: str = option(MISSING, "folder of the result, created if it does not exist", positional=True)
    layers: list[int] = option(
        MISSING, "attention layers to replace, counted from 0, e.g. 1,3,5", group=LAYERS, minimum=0
    )
    mixer: Literal["gka", "gla"] | None = option(
        None, "gka, or gla, the layer without the solve; default: that of the model's layers, or gka", group=LAYERS
    )
    solver: SolverName | None = shared.solver(LAYERS, default="chebyshev")
    solver_steps: list[int] | None = option(
        None,
        "steps of each stage of the solve, e.g. 31 or 16,16; default: depends on the dtype",
        group=LAYERS,
        minimum=1,
        maximum=128,
    )
    tolerance: float | None = shared.tolerance(LAYERS, default="all steps are made")
    ridge_ratio: float | None = shared.ridge_ratio(LAYERS)
    seed: int = option(0, "random seed of the weights that have no source in the model", group=LAYERS, minimum=0)
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "dtype of the weights; auto keeps the dtype of the model", group=MACHINE
    )
    overwrite: bool = option(False, "replace an existing model in the result folder", group=RUN)


@dataclass
class _Shared:
    """Options that `gka distill` and `gka rank-layers` share; they mean the same in `gka train`."""

    data: list[str] | None = option(
        None,
        "text files and folders; folders are searched with their subfolders. Default: the source "
        "files of Python's standard library",
        group=DATA,
        metavar="PATH",
    )
    seq_len: int = option(512, "tokens per sequence", group=DATA, minimum=2)
    validation_fraction: float = option(
        0.05,
        "fraction of the files to hold out for measurements, chosen by a hash of the file names",
        group=DATA,
        above=0,
        maximum=0.5,
    )
    eval_bytes: int = option(200_000, "bytes of held-out text per measurement; 0 = all", group=DATA, minimum=0)
    layer_steps: int = option(
        500, "optimiser steps of stage 1: new layers learn the outputs of the old ones", group=TRAINING, minimum=0
    )
    layer_learning_rate: float = option(2e-3, "peak learning rate of stage 1", group=TRAINING, above=0)
    batch_size: int = shared.batch_size(8)
    accumulation: int = shared.accumulation()
    warmup: float = shared.warmup("fraction of the steps with a rising learning rate")
    weight_decay: float = shared.weight_decay(0.0)
    seed: int = option(0, "random seed of the data order and of random layers", group=TRAINING, minimum=0)
    device: Device = shared.device()
    dtype: Dtype = shared.dtype_of_activations()
    resume: bool = option(False, "resume the run in the output folder, with its saved options", group=RUN)
    overwrite: bool = shared.overwrite()
    log_every: int = shared.log_every()
    save_every: int = shared.save_every()


@dataclass
class _Distill:
    student: str = option(MISSING, "folder of the hybrid model, written by gka convert", positional=True)
    teacher: str = option(MISSING, "folder of the original model", group=LAYERS, metavar="DIR")


@dataclass
class DistillOptions(_Shared, _Distill):
    """Options of `gka distill`."""

    tune_steps: int = option(
        500, "optimiser steps of stage 2: fine-tuning of all weights", group=TRAINING, minimum=0
    )
    learning_rate: float = option(3e-4, "peak learning rate of stage 2", group=TRAINING, above=0)
    kl_weight: float = option(
        1.0,
        "weight of the KL divergence from the teacher in the loss of stage 2; 0 = loss on the text alone",
        group=TRAINING,
        minimum=0,
    )
    gradient_checkpointing: bool = option(
        False,
        "recompute activations in the backward pass of stage 2: uses less memory and about a third more time",
        group=MACHINE,
    )
    output: str = shared.output("runs/distilled")
    eval_every: int = option(200, "steps between two validations in stage 2", group=RUN, minimum=1)

    @staticmethod
    def saved(given: Mapping[str, Any]) -> dict[str, Any]:
        """As `saved_options`."""
        return saved_options(DistillOptions, given)


@dataclass
class _Rank:
    teacher: str = option(MISSING, "folder of a Llama, Mistral, Qwen2, Qwen3 or hybrid model", positional=True)


@dataclass
class RankOptions(_Shared, _Rank):
    """Options of `gka rank-layers`."""

    output: str = shared.output("runs/ranked")

    @staticmethod
    def saved(given: Mapping[str, Any]) -> dict[str, Any]:
        """As `saved_options`."""
        return saved_options(RankOptions, given)
