"""States over thousands of decode steps beside a fresh prefill: `benchmarks/bench_long_decode.py` in short."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import bench_long_decode

TOKENS = 3000
WEAK = (0.0, -1e-5, -1e-4, -1e-3)  # decays that bfloat16 states cannot follow


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(bench_long_decode.rows(TOKENS))


def of(rows: list[dict[str, Any]], part: str, states: str) -> list[dict[str, Any]]:
    return [row for row in rows if (row["part"], row["states"]) == (part, states)]


def test_float32_states_stay_what_a_prefill_gives(rows: list[dict[str, Any]]) -> None:
    found = of(rows, "op", "float32")
    assert [row["gate"] for row in found] == list(bench_long_decode.GATES)
    for row in found:
        for mark in row["marks"]:
            assert mark["finite"] and mark["asymmetry"] < 1e-6 and mark["least"] > -1e-7, (row["gate"], mark)
            assert max(mark["error"].values()) < 1e-5, (row["gate"], mark)
        beside = row["beside a prefill of the window"]
        assert max(beside["S_kk"], beside["S_kv"]) < 1e-5 and beside["o"] < 1e-4, row["gate"]


def test_bfloat16_states_follow_decays_that_are_not_too_weak(rows: list[dict[str, Any]]) -> None:
    """docs/reliability.md: a state that loses less than half a unit of its last place a token cannot change."""
    for row in of(rows, "op", "bfloat16"):
        for mark in row["marks"]:
            assert mark["finite"] and mark["asymmetry"] < 1e-2 and mark["least"] > -5e-3, (row["gate"], mark)
        error = max(row["marks"][-1]["error"].values())
        bound = {-1e-2: 0.1, "varied": 1.0}.get(row["gate"], 0.01)
        assert error > 0.05 if row["gate"] in WEAK else error < bound, (row["gate"], error)


def test_the_layer_and_its_cache_stay_what_a_prefill_gives(rows: list[dict[str, Any]]) -> None:
    found = of(rows, "layer", "float32")
    assert len(found) == len(bench_long_decode.LAYER_GATES) + 1
    for row in found:
        assert max(row["beside a prefill of the window"].values()) < 1e-5, row
        assert row["gate"] == "output" or (row["finite"] and row["asymmetry"] < 1e-6 and row["least"] > -1e-7)


def test_a_window_can_be_made_again() -> None:
    first, again = (bench_long_decode.block_of_tokens(3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.q, bench_long_decode.block_of_tokens(4).q)
    assert bench_long_decode.window_of(-1e-3, 10**6) == 16_000 and bench_long_decode.window_of(0.0, 5000) == 5000
