"""Which tokens and sequences a rank holds, how they are cut and gathered, and the errors of what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import sharded_op
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks


@st.composite
def packs(draw: st.DrawFn) -> tuple[int, str, list[int]]:
    """Ranks, layout and cu_seqlens."""
    size, layout = draw(st.integers(1, 4)), draw(st.sampled_from(("contiguous", "zigzag")))
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    if layout == "zigzag":
        lengths[-1] += -sum(lengths) % (2 * size)
    return size, layout, np.cumsum([0, *lengths]).tolist()


@given(packs())
def test_every_token_has_one_place(ranks: Ranks, pack: tuple[int, str, list[int]]) -> None:
    size, layout, edges = pack
    T, N = edges[-1], len(edges) - 1
    sequence = np.repeat(np.arange(N), np.diff(edges))
    found = ranks.run(size, sharded_op.shard_of, T, edges, layout, 2)
    assert sorted(token for rank in found for token in rank["tokens"]) == list(range(T))
    pieces: dict[int, tuple[int, int]] = {}
    for rank in found:
        tokens, plan = rank["tokens"], rank["sequences"]
        assert tokens == [token for start, stop in rank["segments"] for token in range(start, stop)]
        assert rank["positions"] == [token - edges[sequence[token]] for token in tokens]
        # Every token is in the local sequence that has the number of its global one.
        local = np.repeat(plan.indices, np.diff(plan.cu_seqlens))
        assert local.tolist() == [sequence[token] for token in tokens]
        assert rank["kept"] and sum(plan.counts) == len(plan.indices) == len(plan.cu_seqlens) - 1
        pieces |= dict(zip(plan.pieces, rank["segments"], strict=True))
    in_order = [pieces[n] for n in range(len(pieces))]
    assert [start for start, _ in in_order[1:]] == [stop for _, stop in in_order[:-1]]
    for rank in found:
        for n, (start, stop) in enumerate(rank["segments"]):
            plan = rank["sequences"]
            inside = start < stop
            assert plan.continues[n] == (inside and start not in edges)
            assert plan.open[n] == (inside and stop not in edges)
            if plan.continues[n]:
                begin, end = in_order[plan.origins[n]]
                assert begin <= edges[sequence[start]] < end
            else:
                assert plan.origins[n] == plan.pieces[n]
    # Sequences that end are counted once, those without tokens too.
    ended = [
        index
        for rank in found
        for n, indices in enumerate(np.split(rank["sequences"].indices, np.cumsum(rank["sequences"].counts)[:-1]))
        for index in (indices[:-1] if rank["sequences"].open[n] else indices)
    ]
    assert sorted(index for index in ended if index >= 0) == list(range(N))


@given(packs())
def test_gathered_is_the_whole(ranks: Ranks, pack: tuple[int, str, list[int]]) -> None:
    size, layout, edges = pack
    T = edges[-1]
    x = np.arange(2.0 * T).reshape(2, T)
    found = ranks.run(size, sharded_op.shard_of, T, edges, layout, 2)
    for rank in found:
        assert np.array_equal(rank["whole"], x**2)
    # Every rank's loss is that of the whole, and has a gradient for each rank's own tokens.
    assert np.array_equal(sum(rank["gradient"] for rank in found), size * 2 * x * np.arange(T))


REFUSED = {
    "layout": "ValueError: layout is 'ring'; expected one of ('contiguous', 'zigzag')",
    "mesh": "ValueError: group_or_mesh is a mesh with the dims ('dp', 'cp'); expected one dim, such as mesh['cp']",
    "group": "TypeError: group_or_mesh is a str; expected a torch.distributed.ProcessGroup",
    "T": "ValueError: T is -1; expected at least 0",
    "kind of T": "TypeError: T is 8.0; expected an integer",
    "edges": "ValueError: cu_seqlens is [0, 5, 3, 8]; expected to rise from 0 to T = 8",
    "kind of edges": "TypeError: cu_seqlens is [0, 2.5, 8]; expected a list or a tensor of integers, [N + 1]",
    "local tokens": "ValueError: q has shape (1, 8, 2, 16); expected 2 tokens in dim 1, this process's of 8",
    "take": "ValueError: x has shape (1, 7, 2, 16); expected 8 in dim 1",
    "gather": "ValueError: x has shape (1, 8, 2, 16); expected 2 in dim 1",
    "shard": "TypeError: shard is a ContextParallel; expected the result of ContextParallel.shard",
    "rows": "ValueError: q has batch size 2; expected 1 with a packed batch",
    "cu_seqlens": "TypeError: cu_seqlens is given; expected ContextParallel.shard(T, cu_seqlens) to have it",
    "state": "ValueError: initial_state.S_kv has shape (1, 2, 16, 16); expected (2, 2, 16, 16)",
    "transform": "ValueError: a transform of torch.func or forward mode is active",
    "pickle": "TypeError: a ContextParallel cannot be pickled",
    "T for zigzag": "ValueError: T is 9; expected a multiple of 8, two pieces for each of 4 processes",
}


@pytest.mark.parametrize("layout", ("contiguous", "zigzag"))
def test_what_does_not_fit_is_refused(ranks: Ranks, layout: str) -> None:
    for found in ranks.run(4, sharded_op.refusals, layout):
        assert found.keys() == {name for name in REFUSED if layout == "zigzag" or name != "T for zigzag"}
        for name, message in found.items():
            assert message.startswith(REFUSED[name]), name
