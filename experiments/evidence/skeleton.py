"""One model skeleton for all mixers, with the same number of parameters.

Embedding, norms, residual blocks and output projection are the same. Mixers have different numbers of parameters:
softmax attention has no output gate, Mamba-2 has an expansion of 2. The width of the feed-forward blocks makes up
for this; it is the only size that differs.

Unless initializer_range is given, initial weights are those of the library: normal with variance 1 / hidden_size.
The standard deviation 0.02 of transformers equals this only at a hidden size of 2500. Projections into the
residual stream are smaller by sqrt(2 blocks), as in GPT-2. With 0.02 at a hidden size of 384, the outputs of the
blocks are large compared with the embedding, and all mixers except Mamba-2 need hundreds of steps before the loss
falls.
"""

from __future__ import annotations

from typing import Any

import torch

from gka.hf import GKAConfig, GKAForCausalLM

from ..peers import GPU_MIXERS, MIXERS, WHOLE_PEERS, mixer_config

TOLERANCE = 0.02  # relative difference of the numbers of parameters
_STEP = 8  # feed-forward widths are multiples of it, which is fast on a GPU


def count_parameters(config: GKAConfig) -> int:
    """The number of parameters of the language model, without allocating them."""
    with torch.device("meta"):
        return int(GKAForCausalLM(config).num_parameters())


def skeleton(mixer: str, **fields: Any) -> GKAConfig:
    """The configuration of a model to compare.

    Args:
        mixer: one of MIXERS, GPU_MIXERS or WHOLE_PEERS.
        **fields: arguments of GKAConfig for the mixer "gka"; they decide the number of parameters of all models.

    Returns:
        The configuration, with another intermediate_size if the mixer has more or fewer parameters than "gka".

    Raises:
        ValueError: the mixer is unknown, or the sizes are so small that no width meets TOLERANCE.
    """
    known = (*MIXERS, *GPU_MIXERS, *WHOLE_PEERS)
    if mixer not in known:
        raise ValueError(f"mixer is {mixer!r}; expected one of {known}")
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
    """The nearest multiple of _STEP, at least one _STEP; unchanged if less than half a _STEP is missing."""
    given = round(width - missing)
    return given if abs(missing) < _STEP / 2 else max(_STEP, _STEP * round(width / _STEP))
