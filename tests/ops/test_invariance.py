"""What must not change the numbers: chunk size, cuts in time, packing, head groups. 1e-10 in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import CASES, INPUTS, Case, assert_close, gradients, make_inputs, run
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases
from torch import Tensor

from gka.ops import State, gated_kalmanet, gated_kalmanet_step
from gka.ops.torch import chunked_inputs

pytestmark = pytest.mark.usefixtures("poisoned")

TOKENS = ("q", "k", "v", "g", "alpha", "beta")


def leaves_of(arguments: dict) -> dict[str, Tensor]:
    return {n: arguments[n].detach().clone().requires_grad_() for n in INPUTS if arguments.get(n) is not None}


def with_gradients(o: Tensor, state: State, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    assert state.S_kk is not None
    outputs = {"o": o, "final S_kv": state.S_kv, "final S_kk": state.S_kk}
    return {**outputs, **gradients(outputs, leaves)}


def initial(leaves: dict[str, Tensor]) -> State | None:
    return State(leaves["S_kk"], leaves["S_kv"]) if "S_kk" in leaves else None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunk_size(case: Case) -> None:
    arguments = make_inputs(case)
    ref = run(arguments, chunk_size=16)
    for chunk_size in (32, 64, 128):
        assert_close(run(arguments, chunk_size=chunk_size), ref, 1e-10, f"chunk_size {chunk_size}")


@given(case=cases(), chunks=st.integers(1, 9))
def test_blocks_of_any_size(case: Case, chunks: int) -> None:
    arguments = make_inputs(case)
    ref = run(arguments, chunk_size=8)
    with pytest.MonkeyPatch.context() as patch:
        real = chunked_inputs.schedule
        patch.setattr(chunked_inputs, "schedule", lambda bounds, size, _: real(bounds, size, chunks))
        assert_close(run(arguments, chunk_size=8), ref, 1e-10)


@given(case=cases(packed=False), data=st.data())
def test_split_at_any_point(case: Case, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, case.lengths[0]))
    arguments = make_inputs(case)
    leaves = leaves_of(arguments)
    options = {"output_final_state": True, "normalize_qk": case.normalize_qk, "chunk_size": 16}
    state, outputs = initial(leaves), []
    for part in (slice(0, cut), slice(cut, None)):
        tokens = (leaves[n][:, part] if n in leaves else None for n in TOKENS)
        o, state = gated_kalmanet(*tokens, initial_state=state, **options)
        outputs.append(o)
    assert state is not None
    out = with_gradients(torch.cat(outputs, dim=1), state, leaves)
    assert_close(out, run(arguments, chunk_size=16), 1e-10)


@given(case=cases(packed=False, max_length=12))
def test_steps_of_one_token(case: Case) -> None:
    arguments = make_inputs(case)
    leaves = leaves_of(arguments)
    B, T = leaves["q"].shape[:2]
    zero = (torch.zeros(B, case.H, case.D, width, dtype=torch.float64) for width in (case.D, case.V))
    state, outputs = initial(leaves) or State(*zero), []
    for t in range(T):
        tokens = (leaves[n][:, t] if n in leaves else None for n in TOKENS)
        o, state = gated_kalmanet_step(*tokens, state=state, normalize_qk=case.normalize_qk)
        outputs.append(o)
    assert_close(with_gradients(torch.stack(outputs, dim=1), state, leaves), run(arguments), 1e-10)


@given(case=cases(packed=True))
def test_packed_equals_separate(case: Case) -> None:
    arguments = make_inputs(case)
    leaves = leaves_of(arguments)
    options = {"output_final_state": True, "normalize_qk": case.normalize_qk}
    outputs, finals, start = [], [], 0
    for n, length in enumerate(case.lengths):
        tokens = (leaves[name][:, start : start + length] if name in leaves else None for name in TOKENS)
        given_state = initial(leaves)
        own = None if given_state is None else State(*(part[n : n + 1] for part in given_state))
        o, final = gated_kalmanet(*tokens, initial_state=own, **options)
        outputs.append(o)
        finals.append(final)
        start += length
    final = State(*(torch.cat(parts) for parts in zip(*finals, strict=True)))
    out = with_gradients(torch.cat(outputs, dim=1), final, leaves)
    assert_close(run(arguments), out, 1e-10)


@given(case=cases())
def test_groups_equal_repeated_heads(case: Case) -> None:
    arguments = make_inputs(case)
    leaves = leaves_of(arguments)
    repeated = {n: leaves[n].repeat_interleave(case.H // case.Hk, dim=2) for n in ("k", "v")}
    o, final = gated_kalmanet(
        *({**leaves, **repeated}.get(n) for n in TOKENS),
        initial_state=initial(leaves),
        output_final_state=True,
        cu_seqlens=arguments["cu_seqlens"],
        normalize_qk=case.normalize_qk,
    )
    assert final is not None
    assert_close(run(arguments), with_gradients(o, final, leaves), 1e-10)


@given(case=cases(packed=False), position=st.integers(0, 70))
def test_padding_leaves_no_trace(case: Case, position: int) -> None:
    """Tokens with beta = 0 and g = 0, whatever their q, k and v, change neither state nor other outputs."""
    arguments = make_inputs(case)
    leaves = leaves_of(arguments)
    B, T = leaves["q"].shape[:2]
    position = min(position, T)
    leaves.setdefault("beta", torch.ones(B, T, case.H, dtype=torch.float64, requires_grad=True))
    padded = {}
    for name in TOKENS:
        if name in leaves:
            pad = torch.zeros if name in ("g", "beta") else torch.ones
            rows = pad(B, 3, *leaves[name].shape[2:], dtype=torch.float64)
            padded[name] = torch.cat([leaves[name][:, :position], rows, leaves[name][:, position:]], dim=1)
    options = {
        "initial_state": initial(leaves),
        "output_final_state": True,
        "normalize_qk": case.normalize_qk,
    }
    o, final = gated_kalmanet(*(padded.get(n) for n in TOKENS), chunk_size=16, **options)
    assert final is not None
    o = torch.cat([o[:, :position], o[:, position + 3 :]], dim=1)
    out = with_gradients(o, final, leaves)
    if not case.beta:
        arguments["beta"] = torch.ones(B, T, case.H, dtype=torch.float64)
    assert_close(out, run(arguments), 1e-10)
