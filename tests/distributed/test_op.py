"""The op on rows that several ranks share equals the op of one process: outputs, states, gradients, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import sharded_op
import torch
from helpers import Case, run
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from strategies import cases

BOUND = 1e-10


def reference(case: Case, kind: dict[str, Any], options: dict[str, Any]) -> sharded_op.Arrays:
    return sharded_op.arrays(run(sharded_op.inputs(case, **kind), **options))


def worst(found: list[dict[str, float]]) -> dict[str, float]:
    """Of each output and gradient the largest error of all ranks."""
    return {name: max(errors[name] for errors in found) for name in found[0]}


def assert_near(found: list[dict[str, float]], bound: float = BOUND) -> None:
    wrong = {name: error for name, error in worst(found).items() if not error <= bound}
    assert not wrong, f"beyond {bound:g}: {wrong}"


def fitted(case: Case, layout: str, size: int) -> Case:
    """The case with lengths that the layout can cut: for zigzag the tokens of a row divide by 2 size."""
    if layout == "contiguous":
        return case
    total = sum(case.lengths) if case.packed else case.lengths[0]
    more = -total % (2 * size)
    lengths = [*case.lengths[:-1], case.lengths[-1] + more] if case.packed else [n + more for n in case.lengths]
    return Case(**{**vars(case), "lengths": tuple(lengths)})


@given(
    cases(max_length=24),
    st.sampled_from(("contiguous", "zigzag")),
    st.integers(2, 4),
    st.booleans(),
    st.sampled_from(({}, {"solver_steps": (8, 8)}, {"solver": "cg"}, {"solver_steps": ()}, {"scale": 0.3})),
)
def test_equals_one_process(
    ranks: Ranks, case: Case, layout: str, size: int, faded: bool, options: dict[str, Any]
) -> None:
    case = fitted(case, layout, size)
    kind = {"faded": faded, "solves": options.get("solver_steps") != ()}
    expected = reference(case, kind, options)
    assert_near(ranks.run(size, sharded_op.compare, case, layout, expected, kind, options))


EDGES = {
    "fewer tokens than ranks": Case(lengths=(2,), state=True),
    "one token in two rows": Case(lengths=(1, 1)),
    "a sequence over all ranks": Case(lengths=(1, 30, 2), packed=True),
    "borders at ends of sequences": Case(lengths=(8, 8, 8, 8), packed=True, state=False),
    "sequences without tokens": Case(lengths=(0, 0, 8, 0, 0, 7, 0, 1, 0), packed=True),
    "no tokens": Case(lengths=(0, 0), packed=True),
    "grouped heads, normalised": Case(lengths=(23,), H=6, Hk=2, D=5, V=9, normalize_qk=True),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(ranks: Ranks, name: str) -> None:
    case = EDGES[name]
    expected = reference(case, {}, {})
    assert_near(ranks.run(4, sharded_op.compare, case, "contiguous", expected, {}, {}))


@pytest.mark.parametrize("layout", ("contiguous", "zigzag"))
def test_a_broken_border_is_seen(ranks: Ranks, layout: str) -> None:
    """Without what later ranks send to the sums of g, the gradients of g are wrong, and no others."""
    case = Case(lengths=(24,))
    found = worst(ranks.run(3, sharded_op.compare_broken, case, layout, reference(case, {}, {})))
    assert {name for name, error in found.items() if error > 1e-3} == {"dg", "states dg"}
    assert all(error <= BOUND for name, error in found.items() if not name.endswith("dg"))


@pytest.mark.parametrize("layout", ("contiguous", "zigzag"))
@pytest.mark.parametrize("names", (["S_kv"], ["S_kk"], ["q", "alpha"], ["k"], ["g"]), ids=" ".join)
def test_some_inputs_have_gradients(ranks: Ranks, layout: str, names: list[str]) -> None:
    """All ranks take part in the backward pass, or none."""
    assert_near(ranks.run(3, sharded_op.compare_gradients_of, Case(lengths=(12, 12)), layout, names))


@pytest.mark.parametrize("how", ("checkpoint", "autocast", "compile"))
def test_under(ranks: Ranks, how: str) -> None:
    case = Case(lengths=(13, 13))
    assert_near(ranks.run(2, sharded_op.compare_wrapped, case, reference(case, {}, {}), how))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_inputs_of_16_bits(ranks: Ranks, dtype: torch.dtype) -> None:
    """The errors are not much larger than those of one process: gradients are rounded once more."""
    case = Case(lengths=(96,), D=32, V=32, normalize_qk=True)
    expected = sharded_op.rounded_reference(case, dtype)
    for shared, alone in ranks.run(2, sharded_op.compare_16_bits, case, dtype, expected):
        assert {
            name: (error, alone[name]) for name, error in shared.items() if error > 1.5 * alone[name] + 1e-6
        } == {}


def test_one_collective_each_way(ranks: Ranks) -> None:
    for size in (2, 3):
        assert ranks.run(size, sharded_op.count_collectives, Case(lengths=(9,)), False) == [[1, 1]] * size
        assert ranks.run(size, sharded_op.count_collectives, Case(lengths=(9,)), True) == [[2, 2]] * size
