"""Models with bfloat16 weights under FSDP2, FSDP1 and accelerate, on two CPU processes (gloo)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from forked import run_ranks
from fsdp_narrow_run import CASES


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has found, by case."""
    folder = tmp_path_factory.mktemp("fsdp")
    run_ranks("-m", "fsdp_narrow_run", str(folder))
    return [json.loads((folder / f"seen {rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_whole_model(seen: list[dict[str, Any]], name: str) -> None:
    for found in seen:
        assert found[name]["error"] == 0.0


@pytest.mark.parametrize("name", CASES)
def test_it_trains(seen: list[dict[str, Any]], name: str) -> None:
    first, second = (sum(found[name]["losses"][step] for found in seen) for step in range(2))
    assert second < first


@pytest.mark.parametrize("name", [name for name in CASES if "FSDP1" not in name])
def test_it_is_saved_whole(seen: list[dict[str, Any]], name: str) -> None:
    """Gathered, loaded into a model that is not sharded, and saved with what rounding has left out."""
    found = seen[0][name]
    assert found["lost"] == []
    assert not [n for n in found["unmoved"] if n.endswith("weight")]
    assert [n for n in found["unmoved"] if n.endswith("_rest")], "training does not change the rests"
