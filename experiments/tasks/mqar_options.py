"""The options and the cells of `python -m experiments mqar`; nothing here imports torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gka.cli.options import option

MIXERS = ("gka", "gla", "attention")
ALL_MIXERS = (*MIXERS, "gdn", "mamba2")


def _list(default: Sequence[Any], help: str, **settings: Any) -> Any:
    """Declare an option that is a list; every instance gets its own."""
    metadata = option(None, help, **settings).metadata
    return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)


_TASK, _MODEL, _TRAINING, _RUN = "task", "models", "training", "run"


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

    mixers: list[str] = _list(  # noqa: RUF009
        MIXERS,
        "what to compare: gka; gla, the same layer without the solve; attention (softmax); gdn (Gated DeltaNet); "
        "mamba2",
        group=_MODEL,
        metavar="NAME",
    )
    dims: list[int] = _list(  # noqa: RUF009
        (64, 128, 256), "widths of the residual stream", group=_MODEL, minimum=2
    )
    heads: int = option(2, "heads of a layer", group=_MODEL, minimum=1)
    head_dim: int | None = option(
        None, "dim of keys and values of a head; default: dim / heads", group=_MODEL, minimum=1
    )

    epochs: int = option(64, "passes over the training sequences", group=_TRAINING, minimum=1)
    batch_size: int = option(256, "sequences per step", group=_TRAINING, minimum=1)
    learning_rates: list[float] = _list(  # noqa: RUF009
        (1e-3, 3e-3, 1e-2),
        "peak rates to try with every mixer; the best is reported",
        group=_TRAINING,
        above=0,
    )
    warmup: float = option(
        0.05,
        "share of the steps in which the rate rises; then it falls to 0 as a cosine",
        group=_TRAINING,
        minimum=0,
        maximum=0.9,
    )
    weight_decay: float = option(
        0.1,
        "weight decay of the matrices; norms, biases, A_log, dt_bias and D have none",
        group=_TRAINING,
        minimum=0,
    )
    adam_beta2: float = option(
        0.95,
        "beta2 of AdamW; 0.999 slows the start, as gradients of single tokens are rare",
        group=_TRAINING,
        minimum=0,
        maximum=0.9999,
    )
    eval_every: int = option(100, "steps between two tests", group=_TRAINING, minimum=1)
    stop_accuracy: float = option(
        0.99, "end a training once the test accuracy is above this", group=_TRAINING, above=0, maximum=1
    )
    seeds: list[int] = _list(  # noqa: RUF009
        (0,), "random seeds of data and weights, one training each", group=_TRAINING, minimum=0
    )

    device: Literal["auto", "cpu"] = option(
        "auto", "device to compute on; auto takes a GPU if there is one", group=_RUN
    )
    threads: int | None = option(None, "CPU threads; default: what PyTorch takes", group=_RUN, minimum=1)
    output: str = option(
        "runs/mqar", "folder of the results, created if it does not exist", group=_RUN, metavar="DIR"
    )
    resume: bool = option(False, "run the remaining cells, keep the results in the output folder", group=_RUN)
    overwrite: bool = option(False, "delete the results in the output folder", group=_RUN)


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
