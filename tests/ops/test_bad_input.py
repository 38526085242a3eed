"""Bad arguments are named, with what came and what is expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from forked import run_forked
from helpers import Case, make_inputs

from gka.nn.cache import LayerState
from gka.ops import State, gated_kalmanet, gated_kalmanet_step

CASE = Case(lengths=(6, 6), H=4, Hk=2, D=3, V=5)


def call(packed: bool = False, **changes: object) -> None:
    arguments = make_inputs(Case(lengths=(4, 2), packed=True) if packed else CASE, torch.float32)
    state = State(arguments.pop("S_kk"), arguments.pop("S_kv"))
    gated_kalmanet(**{"initial_state": state, **arguments, **changes})


z = torch.zeros
BAD = {
    "q not a tensor": ({"q": [1.0]}, TypeError, "q is a list; expected a torch.Tensor"),
    "q integers": ({"q": z(2, 6, 4, 3, dtype=torch.long)}, TypeError, "q has dtype torch.int64"),
    "q dims": ({"q": z(2, 6, 4)}, ValueError, r"q has shape \(2, 6, 4\); expected 4 dims"),
    "D too large": ({"q": z(2, 6, 4, 257), "k": z(2, 6, 2, 257)}, ValueError, "D = 257; expected 1 to 256"),
    "k dtype": (
        {"k": z(2, 6, 2, 3, dtype=torch.float64)},
        TypeError,
        "k has dtype torch.float64; expected q's",
    ),
    "k dim": ({"k": z(2, 6, 2, 4)}, ValueError, "k has head dim 4; expected q's, D = 3"),
    "k dims": ({"k": z(6, 2, 3)}, ValueError, r"k has shape \(6, 2, 3\); expected 4 dims"),
    "k heads": ({"k": z(2, 6, 4, 3)}, ValueError, "k has 4 heads and v has 2; expected as many of both"),
    "k and v heads": (
        {"k": z(2, 6, 3, 3), "v": z(2, 6, 3, 5)},
        ValueError,
        "k and v have 3 heads; expected a divisor of q's 4 heads",
    ),
    "heads before tokens": (
        {"q": z(2, 4, 6, 3), "k": z(2, 2, 6, 3), "v": z(2, 2, 6, 5)},
        ValueError,
        r"is q \[B, H, T, D\]\?",
    ),
    "v empty": ({"v": z(2, 6, 2, 0)}, ValueError, "value dim V of at least 1"),
    "v length": ({"v": z(2, 7, 2, 5)}, ValueError, r"v has shape \(2, 7, 2, 5\); expected \(2, 6, 2, 5\)"),
    "g shape": ({"g": z(2, 6, 2)}, ValueError, r"g has shape \(2, 6, 2\); expected \(2, 6, 4\)"),
    "g positive": (
        {"g": z(2, 6, 4) + 0.5},
        ValueError,
        "g has a value of 0.5; expected log-decays of at most 0",
    ),
    "g NaN": ({"g": z(2, 6, 4) * torch.nan}, ValueError, "g has a value of nan"),
    "g None": ({"g": None}, TypeError, "g is a NoneType"),
    "alpha shape": ({"alpha": z(2, 6)}, ValueError, r"alpha has shape \(2, 6\)"),
    "beta dtype": ({"beta": z(2, 6, 4, dtype=torch.int32)}, TypeError, "beta has dtype torch.int32"),
    "ridge zero": (
        {"ridge_ratio": 0.0},
        ValueError,
        "ridge_ratio is 0.0; expected a finite number greater than 0",
    ),
    "ridge text": ({"ridge_ratio": "0.02"}, TypeError, "ridge_ratio is '0.02'"),
    "solver_steps int": ({"solver_steps": 31}, TypeError, "solver_steps is 31; expected a sequence of integers"),
    "solver_steps float": ({"solver_steps": (3.5,)}, TypeError, "solver_steps is"),
    "solver_steps zero": ({"solver_steps": (16, 0)}, ValueError, "at least one step in every stage"),
    "solver name": ({"solver": "lu"}, ValueError, r"solver is 'lu'; expected one of \('chebyshev', 'cg'\)"),
    "solver of nothing": (
        {"solver": "cg", "solver_steps": ()},
        ValueError,
        "solver is 'cg'; expected 'chebyshev'",
    ),
    "tolerance of nodes": (
        {"tolerance": 0.1},
        ValueError,
        "tolerance is 0.1; expected None with solver='chebyshev'",
    ),
    "tolerance large": ({"solver": "cg", "tolerance": 1.0}, ValueError, "tolerance is 1.0; expected None or a"),
    "tolerance text": (
        {"solver": "cg", "tolerance": "1e-3"},
        ValueError,
        "tolerance is '1e-3'; expected None or a",
    ),
    "state type": ({"initial_state": z(2)}, TypeError, "initial_state is a Tensor; expected a pair"),
    "state of a layer": (
        {"initial_state": LayerState([z(2)] * 3, State(z(2), z(2)))},
        TypeError,
        r"initial_state is a LayerState, a layer's state; expected its field \.state",
    ),
    "state of three": (
        {"initial_state": (z(2), z(2), z(2))},
        ValueError,
        "initial_state has 3 parts; expected a pair",
    ),
    "state of lists": (
        {"initial_state": ([1.0], [2.0])},
        TypeError,
        "initial_state.S_kv is a list; expected a torch",
    ),
    "state shape": (
        {"initial_state": State(z(1, 4, 3, 3), z(2, 4, 3, 5))},
        ValueError,
        r"initial_state.S_kk has shape \(1, 4, 3, 3\); expected \(2, 4, 3, 3\)",
    ),
    "state dtype": (
        {"initial_state": State(z(2, 4, 3, 3), z(2, 4, 3, 5, dtype=torch.bfloat16))},
        TypeError,
        "initial_state.S_kv has dtype torch.bfloat16; expected torch.float32 for torch.float32 inputs",
    ),
    "state without S_kk": ({"initial_state": State(None, z(2, 4, 3, 5))}, TypeError, "S_kk is a NoneType"),
    "state with S_kk": ({"solver_steps": ()}, ValueError, "S_kk is given; expected None"),
    "chunk size": ({"chunk_size": 0}, ValueError, "chunk_size is 0"),
    "backend": ({"backend": "cuda"}, ValueError, "backend is 'cuda'; expected one of"),
    "empty backend": ({"backend": ""}, ValueError, "backend is ''; expected one of"),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "q has batch size 2; expected 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_message(name: str) -> None:
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize(
    "edges", [[0, 4], [1, 4, 6], [0, 5, 4, 6], [0, 4, 7], []], ids=lambda edges: "-".join(map(str, edges))
)
def test_cu_seqlens_values(edges: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        call(packed=True, cu_seqlens=torch.tensor(edges, dtype=torch.int64), initial_state=None)


@pytest.mark.parametrize("cu_seqlens", [[0, 6], torch.tensor([0.0, 6.0])], ids=["list", "float"])
def test_cu_seqlens_type(cu_seqlens: object) -> None:
    with pytest.raises(TypeError, match="cu_seqlens"):
        call(packed=True, cu_seqlens=cu_seqlens)


def test_unchanged_arguments_are_good() -> None:
    call()
    call(packed=True)


def test_step_checks_too() -> None:
    good = {
        "q": z(2, 4, 3),
        "k": z(2, 2, 3),
        "v": z(2, 2, 5),
        "g": z(2, 4),
        "state": State(z(2, 4, 3, 3), z(2, 4, 3, 5)),
    }
    gated_kalmanet_step(**good)
    for changes, message in (
        ({"q": z(2, 1, 4, 3)}, "q has shape"),
        ({"g": z(2, 4) + 1}, "g has a value of 1.0"),
        ({"state": State(z(2, 4, 3, 3), z(2, 4, 5, 3))}, "state.S_kv has shape"),
        ({"state": (z(2, 4, 3, 3),)}, "state has 1 parts; expected a pair"),
        ({"tolerance": 0.1}, "tolerance is 0.1; expected None"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_kalmanet_step(**{**good, **changes})


@torch.no_grad()
@pytest.mark.parametrize("pair", [tuple, list, lambda parts: State(*parts)], ids=["tuple", "list", "State"])
@torch.no_grad()
def test_any_pair_is_a_state(pair: Callable[..., Any]) -> None:
    arguments = make_inputs(CASE, torch.float64)
    parts = arguments.pop("S_kk"), arguments.pop("S_kv")
    expected, last = gated_kalmanet(**arguments, initial_state=State(*parts), output_final_state=True)
    o, state = gated_kalmanet(**arguments, initial_state=pair(parts), output_final_state=True)
    assert torch.equal(o, expected) and isinstance(state, State)
    token = [arguments[name][:, 0] for name in ("q", "k", "v", "g", "alpha", "beta")]
    expected, _ = gated_kalmanet_step(*token, state=last)
    held = [part.clone() for part in last]
    o, state = gated_kalmanet_step(*token, state=pair(held), inplace=True)
    assert torch.equal(o, expected) and isinstance(state, State)
    assert state.S_kk is held[0] and state.S_kv is held[1], "written where they were"


def test_the_kernels_without_triton() -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None; from gka.ops import gated_kalmanet; "
        "q = torch.zeros(1, 2, 1, 4); gated_kalmanet(q, q, q, q[..., 0], backend='triton')"
    )
    done = run_forked("-c", code, check=False)
    assert done.returncode != 0 and "backend 'triton' needs the package triton" in done.stderr
