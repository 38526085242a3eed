"""The published config.json of a GKAConfig: the inverse of `published.read_config`."""

from __future__ import annotations

from typing import Any

from .config import GKAConfig
from .published import (
    ARCHITECTURE,
    DEFAULTS,
    MODEL_TYPE,
    MOST_ITERATIONS,
    QWEN3,
    RENAMED,
    REPEATED,
    SYMBOLS,
    check_whole,
)


def write_config(config: GKAConfig, num_iter: int | None = None) -> dict[str, Any]:
    """The published config.json of a configuration.

    Args:
        config: the configuration of the model.
        num_iter: number of iterations to write; None derives it from config.solver_steps (30 if that is None).

    Raises:
        ValueError: the format does not support something in the model.
    """
    _check_exportable(config)
    if num_iter is None:
        if config.solver != "chebyshev":
            raise ValueError(
                f"solver is {config.solver!r}; the published format has Chebyshev iteration alone: say how many "
                "iterations to write (num_iter)"
            )
        if config.solver_steps is not None and (len(config.solver_steps) != 1 or config.solver_steps[0] < 2):
            raise ValueError(
                f"solver_steps is {config.solver_steps}; the published format has one stage of at least 2: "
                "say how many iterations to write (num_iter)"
            )
        num_iter = DEFAULTS["num_iter"] if config.solver_steps is None else config.solver_steps[0] - 1
    check_whole("num_iter", num_iter, MOST_ITERATIONS)
    symbols = {kind: symbol for symbol, kind in SYMBOLS.items()}
    layers = [symbols[kind] for kind in config.layer_types]
    fields = {name: getattr(config, name) for name in QWEN3}
    gka = {key: fields[field] for key, field in REPEATED.items() if key not in DEFAULTS}
    gka |= {**DEFAULTS, **{key: getattr(config, field) for key, field in RENAMED.items()}}
    gka |= {"num_iter": num_iter, "norm_eps": config.rms_norm_eps}
    if config.chunk_size is not None:
        gka["chunk_size"] = config.chunk_size
    written = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **fields,
        "initializer_range": config.initializer_std,
        "rope_parameters": dict(config.rope_parameters or {}),
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
        "hybrid_override_pattern": "-".join(layers),
        "layer_types": layers,
        "gka_config": gka,
        "dtype": str(config.dtype).removeprefix("torch.") if config.dtype is not None else None,
    }
    if "SWA" in layers:
        written["swa_config"] = {"window_size": config.sliding_window}
    return written


def _check_exportable(config: GKAConfig) -> None:
    has_gka = "linear_attention" in config.layer_types
    for name, wrong in (
        ("mixer", has_gka and config.mixer != "gka"),
        ("use_forget_gate", has_gka and not config.use_forget_gate),
        ("use_qk_norm", config.has_attention and not config.use_qk_norm),
        ("attention_output_bias", config.attention_output_bias not in (None, config.attention_bias)),
        ("mlp_bias", config.mlp_bias),
    ):
        if wrong:
            raise ValueError(f"{name} is {getattr(config, name)!r}; the published format cannot say that")
