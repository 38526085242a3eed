"""The model of a recipe of configs/ with one kind of mixer; options that change its sizes, for a quick run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gka

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = ("440m", "1b", "2.8b")


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """--layers, --hidden, --heads, --head-dim and --vocabulary."""
    parser.add_argument("--layers", type=int, help="default: those of the recipe")
    parser.add_argument("--hidden", type=int, help="default: that of the recipe; feed-forward blocks are twice it")
    parser.add_argument("--heads", type=int, help="default: those of the recipe")
    parser.add_argument("--head-dim", type=int, help="default: that of the recipe")
    parser.add_argument("--vocabulary", type=int, default=32000)


def config_of(recipe: str, mixer: str, options: argparse.Namespace, **more: Any) -> gka.GKAConfig:
    """The configuration of a recipe with the sizes of `add_size_options`.

    Args:
        recipe: one of RECIPES.
        mixer: "attention" for softmax attention in all blocks; all other mixers stand in place of GKA layers.
        options: the parsed options.
        **more: other fields of GKAConfig.
    """
    sizes = {
        "num_hidden_layers": options.layers,
        "hidden_size": options.hidden,
        "intermediate_size": None if options.hidden is None else 2 * options.hidden,
        "num_attention_heads": options.heads,
        "head_dim": options.head_dim,
    }
    fields = {name: value for name, value in sizes.items() if value is not None} | more
    path = CONFIGS / f"{recipe}.yaml"
    layers = gka.GKAConfig.from_recipe(path, vocab_size=options.vocabulary, **fields).num_hidden_layers
    kind = "full_attention" if mixer == "attention" else "linear_attention"
    return gka.GKAConfig.from_recipe(path, vocab_size=options.vocabulary, layer_types=[kind] * layers, **fields)
