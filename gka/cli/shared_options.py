"""Options that several commands have in common. Each function declares one; nothing here imports torch."""

from __future__ import annotations

from dataclasses import MISSING
from typing import Any, Literal

from .options import option

# Headings of `--help`.
DATA, LAYERS, MODEL, TRAINING, MACHINE, RUN = "data", "layers", "model", "training", "machine", "run"

Device = Literal["auto", "cpu"]
Dtype = Literal["float32", "bfloat16"]


def device(group: str = MACHINE) -> Any:
    return option("auto", "device to compute on; auto takes a GPU if there is one", group=group)


def dtype_of_weights() -> Any:
    return option("float32", "dtype of the weights", group=MACHINE)


def dtype_of_activations() -> Any:
    return option(
        "float32", "dtype of the activations; weights and optimiser stay float32 (mixed precision)", group=MACHINE
    )


def trained_model() -> Any:
    return option(MISSING, "folder of a trained model or of its run", positional=True)


def solver_steps_of_checkpoint() -> Any:
    return option(
        None,
        "Chebyshev steps of the solve, per stage, e.g. 16; default: those of the checkpoint",
        group=MACHINE,
        metavar="N,N,...",
        minimum=1,
    )


def ridge_ratio(group: str) -> Any:
    return option(None, "strength of the ridge, relative to the norm of the keys' matrix", group=group, above=0)


def batch_size(default: int) -> Any:
    return option(default, "sequences per step, per process and accumulation", group=TRAINING, minimum=1)


def accumulation() -> Any:
    return option(1, "batches whose gradients are added up per step", group=TRAINING, minimum=1)


def warmup(rising: str) -> Any:
    """rising: "share of the run in which the learning rate rises", or the like."""
    return option(0.05, f"{rising}; then it falls to 0 as a cosine", group=TRAINING, minimum=0, maximum=0.9)


def weight_decay(default: float, *, without: str = "norms, biases, A_log and dt_bias") -> Any:
    return option(default, f"weight decay of the matrices; {without} have none", group=TRAINING, minimum=0)


def output(default: str, *, holds: str = "the run") -> Any:
    return option(default, f"folder of {holds}, created if it does not exist", group=RUN, metavar="DIR")


def overwrite() -> Any:
    return option(False, "delete the run in the output folder and start a new one", group=RUN)


def log_every() -> Any:
    return option(10, "steps between two logged losses", group=RUN, minimum=1)


def save_every() -> Any:
    return option(
        200,
        "steps between two checkpoints, a multiple of --log-every; the newest two are kept",
        group=RUN,
        minimum=1,
    )
