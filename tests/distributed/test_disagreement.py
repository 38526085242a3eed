"""Ranks that disagree get an error that names them and their values, each the same. None waits for another."""

from __future__ import annotations

import pytest
from disagreements import MODELS, SHARDS, of_a_missing_rank, of_models, of_others, of_shards
from ranks import Ranks

BEGINNING = "RanksDisagree: processes that share a sequence disagree about "


def same_error(errors: list[str], *parts: str) -> None:
    assert len(set(errors)) == 1 and errors[0].startswith(BEGINNING), errors
    for part in parts:
        assert part in errors[0]


@pytest.mark.parametrize("layout", ("contiguous", "zigzag"))
@pytest.mark.parametrize("name", SHARDS)
def test_a_plan(ranks: Ranks, name: str, layout: str) -> None:
    """The error comes before those of a value that is wrong, or that does not divide, on some ranks."""
    same_error(ranks.run(3, of_shards, name, layout), SHARDS[name][1])


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_a_model(ranks: Ranks, name: str) -> None:
    same_error(ranks.run(3, of_models, name), MODELS[name][1])


def test_an_equal_plan_and_other_tensors(ranks: Ranks) -> None:
    found = ranks.run(3, of_others)
    told = {
        "op": "q: torch.float64 [1, t, 2, 16] on ranks 0, 2; torch.float64 [2, t, 2, 16] on rank 1",
        "layer": "width: 4 on ranks 0, 1; 5 on rank 2",
        "layout": "layout: contiguous on rank 0; zigzag on ranks 1, 2",
        "model": "solver_steps[0]: 8 on rank 0; 9 on rank 1; 10 on rank 2",
        "kinds of calls": "call: parallelize on rank 0; shard on ranks 1, 2",
    }
    assert all(rank.keys() == told.keys() for rank in found)
    for name, part in told.items():
        same_error([rank[name] for rank in found], part)


def test_a_rank_that_does_not_come(ranks: Ranks) -> None:
    told = ranks.run(4, of_a_missing_rank)[0]
    assert told.startswith(
        "RuntimeError: rank 0 waits in vain for the processes that share its sequences, [0, 1]: one of"
    )
