"""One model skeleton for all mixers, with the same number of parameters.

Embedding, norms, residual blocks and output projection are the same. What the mixers differ by in parameters
(softmax attention has no output gate, Mamba-2 an expansion of 2) is made up by the width of the feed-forward
blocks, which is the only size that differs.

First weights, unless initializer_range is given, are the library's own: normal with variance 1 / hidden_size,
which transformers' 0.02 is at a hidden size of 2500 only; projections back into the residual stream are smaller
by sqrt(2 blocks), as GPT-2's. With 0.02 at a hidden size of 384, what blocks add to the stream hides the
embedding, and all mixers but Mamba-2 take hundreds of steps to begin.
"""

from __future__ import annotations

from typing import Any

import torch

from gka.hf import GKAConfig, GKAForCausalLM

from ..peers import MIXERS, mixer_config

TOLERANCE = 0.02  # of the parameters
_STEP = 8  # feed-forward widths are multiples of it, as matrix products on a GPU like them


def count_parameters(config: GKAConfig) -> int:
    """Parameters of the language model, without making any."""
    with torch.device("meta"):
        return int(GKAForCausalLM(config).num_parameters())


def skeleton(mixer: str, **fields: Any) -> GKAConfig:
    """The configuration of a model to compare.

    Args:
        mixer: one of MIXERS.
        **fields: of GKAConfig for the mixer "gka"; its intermediate_size decides how many parameters all have.

    Returns:
        The configuration, with another intermediate_size where the mixer has more or fewer parameters than "gka".

    Raises:
        ValueError: an unknown mixer, or sizes so small that no width brings the parameters within TOLERANCE.
    """
    if mixer not in MIXERS:
        raise ValueError(f"mixer is {mixer!r}; expected one of {MIXERS}")
    wanted = count_parameters(GKAConfig(mixer="gka", **fields))
    config = mixer_config(mixer, **fields)
    width = config.intermediate_size
    per_column = 3 * config.hidden_size * config.num_hidden_layers
    missing = (wanted - count_parameters(config)) / per_column
    config = mixer_config(mixer, **{**fields, "intermediate_size": _nearest(width + missing, missing)})
    have = count_parameters(config)
    if abs(have - wanted) > TOLERANCE * wanted:
        raise ValueError(
            f'mixer "{mixer}" has {have} parameters and "gka" {wanted}: no feed-forward width brings them within '
            f"{TOLERANCE:.0%}; expected larger sizes"
        )
    return config


def _nearest(width: float, missing: float) -> int:
    """A multiple of _STEP, at least one, where half of one or more is missing or too much."""
    given = round(width - missing)
    return given if abs(missing) < _STEP / 2 else max(_STEP, _STEP * round(width / _STEP))
