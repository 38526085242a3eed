"""Layers that are registered under a name of their own."""

from __future__ import annotations

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
