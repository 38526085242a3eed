"""Recipes: from YAML files of `gka train` options (configs/) to the fields of a GKAConfig.

    layers            num_hidden_layers          attention_layers   layer_types
    heads             num_attention_heads        tie_embeddings     tie_word_embeddings
    kv_heads          num_key_value_heads        the others         the same name

`gka train` also uses `model_fields`, so the same file gives the same model.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_RENAMED = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "tie_embeddings": "tie_word_embeddings",
}
_SAME = (
    "hidden_size",
    "intermediate_size",
    "head_dim",
    "mixer",
    "solver",
    "solver_steps",
    "tolerance",
    "ridge_ratio",
)
_KNOWN = (*_RENAMED, *_SAME, "attention_layers", "family")
_REQUIRED = ("hidden_size", "layers", "heads")


def model_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of GKAConfig that options of `gka train` give; other options, and None, are left out.

    Raises:
        ValueError: attention_layers names a block that is not there.
    """
    fields = {_RENAMED.get(name, name): options.get(name) for name in (*_RENAMED, *_SAME)}
    fields["intermediate_size"] = options.get("intermediate_size") or math.ceil(options["hidden_size"] / 3) * 8
    layers, attention = options["layers"], options.get("attention_layers")
    if attention:
        if max(attention) >= layers:
            raise ValueError(f"attention_layers is {attention}; expected blocks from 0 to {layers - 1}")
        fields["layer_types"] = [
            "full_attention" if index in attention else "linear_attention" for index in range(layers)
        ]
    return {name: value for name, value in fields.items() if value is not None}


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The fields of GKAConfig that a recipe gives.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no YAML mapping, lacks hidden_size, layers or heads, misspells an option of the model, or
            is of another family.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: contains a {type(values).__name__}; expected 'option: value' lines")
    options = {str(key).replace("-", "_"): value for key, value in values.items()}
    for name in options:
        near = difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.85)
        if near and near[0] != name:
            raise ValueError(f"{path}: {name} is no option; expected {near[0]}?")
    if missing := [name for name in _REQUIRED if name not in options]:
        raise ValueError(f"{path}: {missing[0]} is missing")
    if options.get("family", "gka") != "gka":
        raise ValueError(f"{path}: family is {options['family']!r}; expected gka")
    return model_fields(options)
