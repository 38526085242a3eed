"""The options and the cells of `python -m experiments mqar`. Nothing here imports torch."""

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
    """Declare a list option; every instance gets its own copy of the default."""
    metadata = option(None, help, **settings).metadata
    return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)


_TASK, _MODELS = "task", "models"


@dataclass
class MQAROptions:
    """Options of the command. The defaults are the smallest setting in the comparison of the Zoology paper."""

    seq_len: int = option(64, "tokens per sequence, an even number", group=_TASK, minimum=4)
    num_pairs: int = option(4, "key-value pairs per sequence", group=_TASK, minimum=1)
    vocab_size: int = option(
        8192, "vocabulary size; half of the tokens are keys, half are values", group=_TASK, minimum=4
    )
    power_a: float = option(
        0.01,
        "exponent of the power law for query positions: 1 is uniform, near 0 puts queries close to the pairs",
        group=_TASK,
        above=0,
    )
    random_non_queries: bool = option(
        True, "fill the remaining positions with random tokens instead of token 0", group=_TASK
    )
    train_examples: int = option(100_000, "number of training sequences", group=_TASK, minimum=1)
    test_examples: int = option(3_000, "number of test sequences", group=_TASK, minimum=1)

    mixers: list[str] = _list(
        MIXERS,
        "layers to compare: gka, gla (the same layer without the solve), attention (softmax), gdn"
        " (Gated DeltaNet), mamba2",
        group=_MODELS,
        metavar="NAME",
    )
    dims: list[int] = _list((64, 128, 256), "widths of the residual stream", group=_MODELS, minimum=2)
    heads: int = option(2, "heads per layer", group=_MODELS, minimum=1)
    head_dim: int | None = option(
        None, "head dimension of keys and values; default: dim / heads", group=_MODELS, minimum=1
    )

    epochs: int = option(64, "passes over the training sequences", group=TRAINING, minimum=1)
    batch_size: int = option(256, "sequences per step", group=TRAINING, minimum=1)
    learning_rates: list[float] = _list(
        (1e-3, 3e-3, 1e-2),
        "peak learning rates to try with every mixer; the best one is reported",
        group=TRAINING,
        above=0,
    )
    warmup: float = shared.warmup("fraction of the steps with a rising learning rate")
    weight_decay: float = shared.weight_decay(0.1, without="norms, biases, A_log, dt_bias and D")
    adam_beta2: float = option(
        0.95,
        "beta2 of AdamW; 0.999 slows the start, because gradients of single tokens are rare",
        group=TRAINING,
        minimum=0,
        maximum=0.9999,
    )
    eval_every: int = option(100, "steps between two tests", group=TRAINING, minimum=1)
    stop_accuracy: float = option(
        0.99, "test accuracy above which a training stops", group=TRAINING, above=0, maximum=1
    )
    seeds: list[int] = _list(
        (0,), "random seeds of data and weights; one training per seed", group=TRAINING, minimum=0
    )

    device: Device = shared.device(RUN)
    threads: int | None = option(None, "CPU threads; default: chosen by PyTorch", group=RUN, minimum=1)
    output: str = shared.output("runs/mqar", holds="the results")
    resume: bool = option(False, "run the remaining cells and keep the results in the output folder", group=RUN)
    overwrite: bool = option(False, "delete the results in the output folder first", group=RUN)


@dataclass(frozen=True)
class Cell:
    """One training of the comparison."""

    mixer: str
    dim: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """A name for messages, e.g. "gka dim 64 lr 0.01 seed 0"."""
        return f"{self.mixer} dim {self.dim} lr {self.learning_rate:g} seed {self.seed}"


def cells(options: MQAROptions) -> list[Cell]:
    """All trainings of the options, ordered so that every mixer has a first result early."""
    axes = itertools.product(options.seeds, options.dims, options.learning_rates, options.mixers)
    return [Cell(mixer, dim, rate, seed) for seed, dim, rate, mixer in axes]
