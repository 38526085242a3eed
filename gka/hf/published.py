"""The configuration of published GKA hybrids, `model_type: hybrid_qwen3`, read; published_writer.py writes it.

It has Qwen3's keys, the kinds of layers as symbols, `hybrid_override_pattern: "*-GKA-SWA"` and the same ones in
`layer_types`, and the tables `gka_config` and `swa_config`. The tensors have the names that they have here. What
a key of `gka_config` is called here:

    num_iter        solver_steps = [num_iter + 1]: updates after x_0, a polynomial of that degree (docs/math.md)
    ridge_strength  ridge_ratio: lambda_t = ridge_strength ||S_kk_t||_F
    use_gate        use_output_gate
    chunk_size      not used: the result does not depend on it, and the default of the device is used
    sizes, norm_eps the fields of the whole model, with which they must agree

Switches that change the function, and are not here, are refused by name unless they have their usual value.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

from transformers import PreTrainedConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

logger = logging.get_logger(__name__)

MODEL_TYPE = "hybrid_qwen3"
ARCHITECTURE = "HybridQwen3ForCausalLM"
OURS = "GKAForCausalLM"  # the same here
SYMBOLS = {"*": "full_attention", "GKA": "linear_attention", "SWA": "sliding_attention"}
OTHER_SYMBOLS = {"GDN": "Gated DeltaNet", "M2": "Mamba-2", "BMF": "B'MOJO-F"}
MOST_ITERATIONS = 1000
DTYPES = ("bfloat16", "float16", "float32")

# gka_config: the published defaults, in the published order.
DEFAULTS: dict[str, Any] = dict(
    use_alpha_connection=True,
    use_v_conv=True,
    use_forgetting_gate=True,
    use_forgetting_gate_kk=True,
    use_beta_gate=True,
    use_gate=True,
    gla_rescale=True,
    solver_type="chebyshev",
    bp_lambda=True,
    num_iter=30,
    ridge_strength=0.02,
    conv_size=4,
    norm_eps=1e-6,
    chunk_size=64,
    kv_proj_rank=None,
    kv_learnable_residual=False,
)
RENAMED = {
    "use_alpha_connection": "use_alpha_connection",
    "use_v_conv": "use_v_conv",
    "use_beta_gate": "use_beta_gate",
    "use_gate": "use_output_gate",
    "conv_size": "conv_size",
    "ridge_strength": "ridge_ratio",
    "kv_proj_rank": "kv_proj_rank",
    "kv_learnable_residual": "kv_learnable_residual",
}
REPEATED = {
    "hidden_size": "hidden_size",
    "head_dim": "head_dim",
    "num_q_heads": "num_attention_heads",
    "num_k_heads": "num_key_value_heads",
    "num_v_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
}
# The one value that this library has, and what another one would be.
FIXED: dict[str, tuple[Any, str]] = {
    "use_forgetting_gate": (True, "the published layer keeps the gate's tensors and leaves them unused"),
    "use_forgetting_gate_kk": (True, "S_kk would not fade while S_kv does"),
    "gla_rescale": (True, "the readout would not be scaled by head_dim ** -0.5"),
    "solver_type": ("chebyshev", "another solver"),
    "bp_lambda": (True, "there would be no gradient through lambda; to load it for inference, write true"),
}
# Qwen3's keys that the model takes as they are.
QWEN3 = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_bias",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_READ_HERE = {
    "model_type",
    "architectures",
    "auto_map",  # code of a checkpoint is never run
    "transformers_version",
    "dtype",
    "torch_dtype",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "hybrid_override_pattern",
    "layer_types",
    "gka_config",
    "swa_config",
}


def read_config(published: dict[str, Any]) -> dict[str, Any]:
    """Fields of a GKAConfig from a published config.json; any other dict is returned as it is.

    Raises:
        ValueError: naming the key, its value and what is expected, for what does not fit or is not here.
    """
    if not isinstance(published, dict) or published.get("model_type") != MODEL_TYPE:
        return published
    fields: dict[str, Any] = {name: published.get(name, getattr(Qwen3Config, name, None)) for name in QWEN3}
    check_whole("num_hidden_layers", fields["num_hidden_layers"])
    _check_token_ids(fields)
    fields["layer_types"] = _read_layers(published, fields["num_hidden_layers"])
    fields["sliding_window"] = _read_window(published, fields["layer_types"])
    fields["rope_parameters"] = _read_rope(published)
    fields["dtype"] = _read_dtype(published)
    fields.update(_read_gka(published.get("gka_config"), fields))
    if published.get("quantization_config") is not None:
        _refuse("quantization_config", published["quantization_config"], "none: it is not supported")
    if published.get("partial_rotary_factor") not in (None, 1.0):
        _refuse("partial_rotary_factor", published["partial_rotary_factor"], "none, as in Qwen3")
    shared = set(PreTrainedConfig().to_dict())
    rest = {name: value for name, value in published.items() if name not in _READ_HERE and name not in fields}
    unread = [name for name, value in rest.items() if name not in shared and value is not None]
    if unread:
        logger.warning(f"not read from the {MODEL_TYPE} configuration: {', '.join(sorted(unread))}")
    passed_on = {name: value for name, value in rest.items() if name in shared}
    # Servers find the class by its name.
    return {**passed_on, **fields, "model_type": "gka", "architectures": [OURS], "use_qk_norm": True}


def _refuse(key: str, value: Any, expected: str) -> NoReturn:
    raise ValueError(f"{key} is {value!r}; expected {expected}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_whole(key: str, value: Any, most: int | None = None) -> None:
    if not _is_whole(value) or value < 1 or (most is not None and value > most):
        _refuse(key, value, "an integer of at least 1" if most is None else f"an integer from 1 to {most}")


def _check_positive(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
        _refuse(key, value, "a finite number greater than 0")


def _check_token_ids(fields: dict[str, Any]) -> None:
    check_whole("vocab_size", fields["vocab_size"])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = fields[name]
        several = name == "eos_token_id" and isinstance(value, list)
        for token in value if several else [value]:
            if token is not None and not (_is_whole(token) and 0 <= token < fields["vocab_size"]):
                _refuse(name, value, f"a token id less than vocab_size, {fields['vocab_size']}")


def _read_layers(published: dict[str, Any], count: int) -> list[str]:
    pattern, types = published.get("hybrid_override_pattern"), published.get("layer_types")
    if pattern is None and types is None:
        _refuse("hybrid_override_pattern", None, 'a symbol for every layer, such as "*-GKA"')
    read = []
    for key, value in (("hybrid_override_pattern", pattern), ("layer_types", types)):
        if value is None:
            continue
        if not isinstance(value, str if key == "hybrid_override_pattern" else list):
            _refuse(key, value, 'symbols joined by "-"' if value is pattern else "a list of symbols")
        symbols = value.split("-") if isinstance(value, str) else value
        wrong = [number for number, symbol in enumerate(symbols) if _kind(symbol) is None]
        if wrong:
            listed = ", ".join(f"layer {number} is {_described(symbols[number])}" for number in wrong)
            raise ValueError(f"{key} has layers that this library does not have: {listed}; it has *, GKA and SWA")
        if len(symbols) != count:
            _refuse(key, value, f"one symbol for each of num_hidden_layers = {count}")
        read.append([str(_kind(symbol)) for symbol in symbols])
    if read[0] != read[-1]:
        _refuse("layer_types", types, f"the layers of hybrid_override_pattern, {pattern!r}")
    return read[0]


def _kind(symbol: Any) -> str | None:
    if not isinstance(symbol, str):
        return None
    return symbol if symbol in SYMBOLS.values() else SYMBOLS.get(symbol)


def _described(symbol: Any) -> str:
    known = isinstance(symbol, str) and symbol in OTHER_SYMBOLS
    return f"{symbol!r} ({OTHER_SYMBOLS[symbol]})" if known else repr(symbol)


def _read_window(published: dict[str, Any], kinds: list[str]) -> int | None:
    """The window of SWA layers: swa_config's, else Qwen3's key."""
    table = _table("swa_config", published.get("swa_config"), {"window_size"})
    if published.get("use_sliding_window") not in (None, False):
        _refuse(
            "use_sliding_window", published["use_sliding_window"], "false: the layers' symbols say which slide"
        )
    if "sliding_attention" not in kinds:
        return None
    key, window = "swa_config.window_size", table.get("window_size")
    if window is None:
        key, window = "sliding_window", published.get("sliding_window")
    if window is None:
        _refuse("swa_config.window_size", None, "a number of tokens, as a layer is SWA")
    check_whole(key, window)
    return int(window)


def _read_rope(published: dict[str, Any]) -> dict[str, Any]:
    """One table from Qwen3's keys of today, rope_parameters, and of before, rope_theta and rope_scaling."""
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        table = published.get(key)
        if table is not None and not isinstance(table, dict):
            _refuse(key, table, "a table")
        for name, value in (table or {}).items():
            name = "rope_type" if name == "type" else name
            if name in found and found[name] != value:
                _refuse(f"{key}.{name}", value, f"what rope_scaling says, {found[name]!r}")
            found[name] = value
    theta = published.get("rope_theta")
    if theta is not None and "rope_theta" in found and found["rope_theta"] != theta:
        _refuse("rope_theta", theta, f"what rope_parameters says, {found['rope_theta']!r}")
    found.setdefault("rope_theta", Qwen3Config.default_theta if theta is None else theta)
    found.setdefault("rope_type", "default")
    _check_positive("rope_theta", found["rope_theta"])
    known = sorted({"default", *ROPE_INIT_FUNCTIONS})
    if found["rope_type"] not in known:
        _refuse("rope_type", found["rope_type"], f"one of {', '.join(known)}")
    return found


def _read_dtype(published: dict[str, Any]) -> str | None:
    key = "dtype" if published.get("dtype") is not None else "torch_dtype"
    value = published.get(key)
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        _refuse(key, value, f"one of {', '.join(DTYPES)}")
    return name


def _table(key: str, table: Any, known: set[str]) -> dict[str, Any]:
    if table is None:
        return {}
    if not isinstance(table, dict):
        _refuse(key, table, "a table")
    for name, value in table.items():
        if name not in known:
            raise ValueError(f"{key}.{name} is {value!r}; this library does not know that key")
    return table


def _read_gka(table: Any, fields: dict[str, Any]) -> dict[str, Any]:
    given = _table("gka_config", table, {*DEFAULTS, *REPEATED})
    values = {**DEFAULTS, **given}
    for key, (only, why) in FIXED.items():
        if type(values[key]) is not type(only) or values[key] != only:
            _refuse(f"gka_config.{key}", values[key], f"{only!r} ({why})")
    for key, field in REPEATED.items():
        if key in values and (values[key] != fields[field] or isinstance(values[key], bool)):
            _refuse(f"gka_config.{key}", values[key], f"{field}, {fields[field]!r}")
    check_whole("gka_config.num_iter", values["num_iter"], MOST_ITERATIONS)
    _check_positive("gka_config.ridge_strength", values["ridge_strength"])
    for key in ("chunk_size", "conv_size"):
        check_whole(f"gka_config.{key}", values[key])
    if values["kv_proj_rank"] is not None:
        check_whole("gka_config.kv_proj_rank", values["kv_proj_rank"])
    for key in ("use_alpha_connection", "use_v_conv", "use_beta_gate", "use_gate", "kv_learnable_residual"):
        if not isinstance(values[key], bool):
            _refuse(f"gka_config.{key}", values[key], "true or false")
    if values["kv_learnable_residual"] and values["kv_proj_rank"] is None:
        values["kv_learnable_residual"] = False  # published: "only used when kv_proj_rank is set"
    return {**{RENAMED[key]: values[key] for key in RENAMED}, "solver_steps": [values["num_iter"] + 1]}
