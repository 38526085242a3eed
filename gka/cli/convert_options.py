"""Options of `gka convert`, `gka distill` and `gka rank-layers`. Nothing here imports torch."""

# ruff: noqa: RUF009  (option() makes a dataclass field)
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal

from . import shared_options as shared
from .commands import saved_options
from .options import option
from .shared_options import DATA, LAYERS, MACHINE, RUN, TRAINING, Device, Dtype


@dataclass
class ConvertOptions:
    """Options of `gka convert`."""

    model: str = option(MISSING, "folder of a Llama, Mistral, Qwen2, Qwen3 or hybrid model", positional=True)
    out: str = option(MISSING, "folder of the result, created if it does not exist", positional=True)
    layers: list[int] = option(
        MISSING, "attention layers to replace, counted from 0, e.g. 1,3,5", group=LAYERS, minimum=0
    )
    solver_steps: list[int] | None = option(
        None,
        "Chebyshev steps of the solve, per stage, e.g. 31 or 16,16; default: what suits the dtype",
        group=LAYERS,
        minimum=1,
        maximum=128,
    )
    ridge_ratio: float | None = shared.ridge_ratio(LAYERS)
    seed: int = option(0, "random seed of the weights that the new layers do not copy", group=LAYERS, minimum=0)
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "dtype of the weights; auto keeps the model's", group=MACHINE
    )
    overwrite: bool = option(False, "replace a model in the folder of the result", group=RUN)


@dataclass
class _Shared:
    """What `gka distill` and `gka rank-layers` have in common, as in `gka train`."""

    data: list[str] | None = option(
        None,
        "text files and folders, as for gka train; default: the sources of this Python's standard library",
        group=DATA,
        metavar="PATH",
    )
    seq_len: int = option(512, "tokens per sequence", group=DATA, minimum=2)
    validation_fraction: float = option(
        0.05,
        "share of the files that is held out for measurements, chosen by a hash of their names",
        group=DATA,
        above=0,
        maximum=0.5,
    )
    eval_bytes: int = option(
        200_000, "bytes of held-out text that each measurement reads; 0 = all", group=DATA, minimum=0
    )
    layer_steps: int = option(
        500, "optimiser steps in which the new layers learn the old ones' outputs", group=TRAINING, minimum=0
    )
    layer_learning_rate: float = option(2e-3, "peak learning rate of these steps", group=TRAINING, above=0)
    batch_size: int = shared.batch_size(8)
    accumulation: int = shared.accumulation()
    warmup: float = shared.warmup("share of the steps in which the learning rate rises")
    weight_decay: float = shared.weight_decay(0.0)
    seed: int = option(0, "random seed of the order of the data and of random layers", group=TRAINING, minimum=0)
    device: Device = shared.device()
    dtype: Dtype = shared.dtype_of_activations()
    resume: bool = option(False, "resume the run in the output folder, with its options", group=RUN)
    overwrite: bool = shared.overwrite()
    log_every: int = shared.log_every()
    save_every: int = shared.save_every()


@dataclass
class _Distill:
    student: str = option(MISSING, "folder of the hybrid that gka convert made", positional=True)
    teacher: str = option(MISSING, "folder of the model it was made from", group=LAYERS, metavar="DIR")


@dataclass
class DistillOptions(_Shared, _Distill):
    """Options of `gka distill`."""

    tune_steps: int = option(
        500, "optimiser steps of the fine-tune of all weights that follows", group=TRAINING, minimum=0
    )
    learning_rate: float = option(3e-4, "peak learning rate of the fine-tune", group=TRAINING, above=0)
    kl_weight: float = option(
        1.0,
        "weight of the divergence from the teacher's predictions, added to the loss on the text; 0 = text alone",
        group=TRAINING,
        minimum=0,
    )
    gradient_checkpointing: bool = option(
        False,
        "recompute activations in the backward pass of the fine-tune: less memory, about a third more time",
        group=MACHINE,
    )
    output: str = shared.output("runs/distilled")
    eval_every: int = option(200, "steps between two validations of the fine-tune", group=RUN, minimum=1)

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
