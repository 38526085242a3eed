"""The options and the cells of `python -m experiments mqar`; nothing here imports torch."""

# ruff: noqa: RUF009  (option() makes a dataclass field)
from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gka.cli import shared_options as shared
from gka.cli.options import option
from gka.cli.shared_options import RUN, TRAINING, Device

MIXERS = ("gka", "gla", "attention")
ALL_MIXERS = (*MIXERS, "gdn", "mamba2")


def _list(default: Sequence[Any], help: str, **settings: Any) -> Any:
    """Declare an option that is a list; every instance gets its own."""
    metadata = option(None, help, **settings).metadata
    return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)


_TASK, _MODELS = "task", "models"


@dataclass
class MQAROptions:
    """Options of the command; the defaults are the smallest setting of the Zoology paper's comparison."""

    seq_len: int = option(64, "tokens of a sequence, even", group=_TASK, minimum=4)
    num_pairs: int = option(4, "key-value pairs of a sequence", group=_TASK, minimum=1)
    vocab_size: int = option(8192, "tokens; half are keys, half values", group=_TASK, minimum=4)
    power_a: float = option(
        0.01,
        "power law of where the queries stand: 1 is uniform, near 0 is close to the pairs",
        group=_TASK,
        above=0,
    )
    random_non_queries: bool = option(
        True, "fill what is neither pair nor query with random tokens; else with token 0", group=_TASK
    )
    train_examples: int = option(100_000, "sequences to train on", group=_TASK, minimum=1)
    test_examples: int = option(3_000, "sequences to score", group=_TASK, minimum=1)

    mixers: list[str] = _list(
        MIXERS,
        "what to compare: gka; gla, the same layer without the solve; attention (softmax); gdn (Gated DeltaNet); "
        "mamba2",
        group=_MODELS,
        metavar="NAME",
    )
    dims: list[int] = _list((64, 128, 256), "widths of the residual stream", group=_MODELS, minimum=2)
    heads: int = option(2, "heads of a layer", group=_MODELS, minimum=1)
    head_dim: int | None = option(
        None, "dim of keys and values of a head; default: dim / heads", group=_MODELS, minimum=1
    )

    epochs: int = option(64, "passes over the training sequences", group=TRAINING, minimum=1)
    batch_size: int = option(256, "sequences per step", group=TRAINING, minimum=1)
    learning_rates: list[float] = _list(
        (1e-3, 3e-3, 1e-2),
        "peak rates to try with every mixer; the best is reported",
        group=TRAINING,
        above=0,
    )
    warmup: float = shared.warmup("share of the steps in which the rate rises")
    weight_decay: float = shared.weight_decay(0.1, without="norms, biases, A_log, dt_bias and D")
    adam_beta2: float = option(
        0.95,
        "beta2 of AdamW; 0.999 slows the start, as gradients of single tokens are rare",
        group=TRAINING,
        minimum=0,
        maximum=0.9999,
    )
    eval_every: int = option(100, "steps between two tests", group=TRAINING, minimum=1)
    stop_accuracy: float = option(
        0.99, "end a training once the test accuracy is above this", group=TRAINING, above=0, maximum=1
    )
    seeds: list[int] = _list(
        (0,), "random seeds of data and weights, one training each", group=TRAINING, minimum=0
    )

    device: Device = shared.device(RUN)
    threads: int | None = option(None, "CPU threads; default: what PyTorch takes", group=RUN, minimum=1)
    output: str = shared.output("runs/mqar", holds="the results")
    resume: bool = option(False, "run the remaining cells, keep the results in the output folder", group=RUN)
    overwrite: bool = option(False, "delete the results in the output folder", group=RUN)


@dataclass(frozen=True)
class Cell:
    """One training of the comparison."""

    mixer: str
    dim: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """For people, e.g. "gka dim 64 lr 0.01 seed 0"."""
        return f"{self.mixer} dim {self.dim} lr {self.learning_rate:g} seed {self.seed}"


def cells(options: MQAROptions) -> list[Cell]:
    """All trainings that the options ask for; a first result of every mixer comes early."""
    axes = itertools.product(options.seeds, options.dims, options.learning_rates, options.mixers)
    return [Cell(mixer, dim, rate, seed) for seed, dim, rate, mixer in axes]
