"""Options that several commands have in common. Each function declares one; nothing here imports torch."""

from __future__ import annotations

from dataclasses import MISSING
from typing import Any, Literal

from .options import option

# Headings of `--help`.
DATA, LAYERS, MODEL, TRAINING, MACHINE, RUN = "data", "layers", "model", "training", "machine", "run"

Device = Literal["auto", "cpu"]
Dtype = Literal["float32", "bfloat16"]
SolverName = Literal["chebyshev", "cg"]


def device(group: str = MACHINE) -> Any:
    return option("auto", "device for the computation; auto uses a GPU if there is one", group=group)


def dtype_of_weights() -> Any:
    return option("float32", "dtype of the weights", group=MACHINE)


def compile_steps() -> Any:
    return option(
        False,
        "decode on a CPU by torch.compile, for servers and long texts: a small model gives up to twice as many "
        "tokens per second, after a wait of 10 to 15 s for each block, less the next time (needs a C++ compiler)",
        group=MACHINE,
    )


def dtype_of_activations() -> Any:
    return option(
        "float32",
        "dtype of the activations; weights and optimiser state stay float32 (mixed precision)",
        group=MACHINE,
    )


def trained_model() -> Any:
    return option(MISSING, "folder of a trained model or of a training run", positional=True)


def solver(group: str, *, default: str) -> Any:
    return option(
        None,
        "solver of the ridge regression: chebyshev, or cg, conjugate gradient, which is not "
        f"faster in training on a GPU; default: {default}",
        group=group,
    )


def tolerance(group: str, *, default: str) -> Any:
    return option(
        None,
        "for cg: residual at which a stage of the solve ends, relative to its start; the solver steps are then an "
        f"upper limit; default: {default}",
        group=group,
        above=0,
        maximum=0.99,
    )


def solver_steps_of_checkpoint() -> Any:
    return option(
        None,
        "steps of each stage of the solve, e.g. 16; default: those of the checkpoint, or with --solver those of "
        "the solver",
        group=MACHINE,
        metavar="N,N,...",
        minimum=1,
    )


def ridge_ratio(group: str) -> Any:
    return option(None, "ridge strength as a fraction of the Frobenius norm of S_kk", group=group, above=0)


def batch_size(default: int) -> Any:
    return option(default, "sequences per batch, in each process", group=TRAINING, minimum=1)


def accumulation() -> Any:
    return option(1, "batches per optimiser step, for gradient accumulation", group=TRAINING, minimum=1)


def warmup(rising: str) -> Any:
    """rising: "fraction of the run with a rising learning rate", or the like."""
    return option(
        0.05, f"{rising}; afterwards it falls to 0 along a cosine", group=TRAINING, minimum=0, maximum=0.9
    )


def weight_decay(default: float, *, without: str = "norms, biases, A_log and dt_bias") -> Any:
    return option(default, f"weight decay of matrices; none for {without}", group=TRAINING, minimum=0)


def output(default: str, *, holds: str = "the run") -> Any:
    return option(default, f"folder of {holds}, created if it does not exist", group=RUN, metavar="DIR")


def overwrite() -> Any:
    return option(False, "delete the run in the output folder and start a new one", group=RUN)


def log_every() -> Any:
    return option(10, "steps between two logged losses", group=RUN, minimum=1)


def save_every() -> Any:
    return option(
        200,
        "steps between two checkpoints, a multiple of --log-every; only the newest two are kept",
        group=RUN,
        minimum=1,
    )
