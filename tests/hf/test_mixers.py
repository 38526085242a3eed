"""Layers that are registered under a name of their own."""

from __future__ import annotations

from typing import Any

import pytest
from model_helpers import tiny_config

from gka.hf import Mixer, register_mixer


@pytest.mark.parametrize("name", ["gka", "gla"])
def test_the_librarys_own_names_are_taken(name: str) -> None:
    with pytest.raises(ValueError, match=f"name is '{name}', which is taken"):
        register_mixer(name, Mixer)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"mixer is 'rwkv'; expected one of \('gka', 'gla'"):
        tiny_config(mixer="rwkv")


@pytest.mark.parametrize("layer_idx", [None, -1, True])
def test_a_mixer_needs_a_place_in_the_cache(layer_idx: Any) -> None:
    with pytest.raises(ValueError, match=f"layer_idx is {layer_idx}"):
        Mixer(tiny_config(), layer_idx)
