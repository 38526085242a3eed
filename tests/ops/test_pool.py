"""Decode steps and prompts whose states are rows of a pool, in PyTorch and by the interpreted kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode_helpers import StepCase, copied, step_arguments
from pool_helpers import INDICES, POOL_CASES, ROWS, assert_step_of_a_pool, bits, pages, state_pool
from reads import Reads

from gka.ops import State, checks, gated_kalmanet_step, gather_states, scatter_states_
from gka.ops.pool import scatter_rows_
from gka.ops.torch import step

INDEX_DTYPES = [torch.int32, torch.int64]


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("case", POOL_CASES, ids=str)
def test_pytorch(case: StepCase, index_dtype: torch.dtype) -> None:
    assert_step_of_a_pool(step.gated_kalmanet_step, case, index_dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_pool_gpu.py runs the kernel itself")
@pytest.mark.parametrize("case", POOL_CASES, ids=str)
def test_kernel(case: StepCase) -> None:
    pytest.importorskip("triton", reason="Triton is made for Linux only")
    from gka.ops.triton import step as triton_step

    index_dtype = INDEX_DTYPES[POOL_CASES.index(case) % 2]
    assert_step_of_a_pool(triton_step.gated_kalmanet_step, case, index_dtype)


def test_all_rows_are_padding() -> None:
    """Also the row that a padding row falls back to stays as it is."""
    arguments = step_arguments(StepCase())
    storage, pool = state_pool(arguments.pop("state"), torch.tensor([0, 1]), gap=1)
    before = storage.clone()
    o, _ = gated_kalmanet_step(**arguments, state=pool, state_indices=torch.tensor([-1, -1]), inplace=True)
    assert not o.any() and torch.equal(bits(storage), bits(before))


def test_no_rows() -> None:
    arguments = step_arguments(StepCase(B=0))
    pool = State(torch.zeros(0, 2, 16, 16), torch.zeros(0, 2, 16, 16))
    arguments["state"], nothing = pool, torch.zeros(0, dtype=torch.int32)
    o, _ = gated_kalmanet_step(**arguments, state_indices=nothing, inplace=True)
    assert o.shape == (0, 2, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("solves", [True, False])
def test_gathered_states_are_those_of_requests_that_go_on(dtype: torch.dtype, solves: bool) -> None:
    state = step_arguments(StepCase(B=5, state=dtype, solver_steps=(4,) if solves else ()))["state"]
    state_indices = torch.tensor(INDICES, dtype=torch.int32)
    _, pool = state_pool(state, state_indices, gap=3)
    found = gather_states(pool, state_indices, torch.tensor([True, True, False, True, False]))
    for part, given in zip(found, state, strict=True):
        if given is None:
            assert part is None
            continue
        expected = given.float().clone()
        expected[[1, 2, 4]] = 0.0
        assert part.dtype == torch.float32 and torch.equal(part, expected)
    everywhere = gather_states(pool, state_indices).S_kv
    assert torch.equal(everywhere[2], state.S_kv[2].float()) and not everywhere[[1, 4]].any()


@pytest.mark.parametrize("solves", [True, False])
def test_scattered_states_are_rounded_to_the_pool(solves: bool) -> None:
    state = step_arguments(StepCase(B=5, solver_steps=(4,) if solves else ()))["state"]
    storage, pool = state_pool(
        State(*(x if x is None else x.bfloat16() for x in state)), torch.tensor([-1] * 5), 3
    )
    expected = storage.clone()
    for part, given in zip(pool, state, strict=True):
        for row, index in enumerate(INDICES):
            if given is not None and index >= 0:
                expected.as_strided(part.shape, part.stride(), part.storage_offset())[index] = given[row]
    scatter_states_(pool, torch.tensor(INDICES), state)
    assert torch.equal(bits(storage), bits(expected))


def test_a_prompt_and_its_decoding_by_the_pool_equal_those_without() -> None:
    """A request starts, another goes on; both decode at rows that they keep."""
    arguments = step_arguments(StepCase(B=2))
    state_indices = torch.tensor([4, 2])
    started = State(*(x * torch.tensor([0.0, 1.0]).view(2, 1, 1, 1) for x in arguments["state"]))
    _, pool = state_pool(arguments.pop("state"), state_indices, gap=3)
    scatter_states_(pool, state_indices, gather_states(pool, state_indices, torch.tensor([False, True])))
    expected_o, expected = gated_kalmanet_step(**arguments, state=started)
    o, _ = gated_kalmanet_step(**arguments, state=pool, state_indices=state_indices, inplace=True)
    assert torch.equal(o, expected_o)
    assert all(torch.equal(x[state_indices], ref) for x, ref in zip(pool, expected, strict=True))


def test_a_step_over_a_pool_is_one_graph() -> None:
    torch._dynamo.reset()
    arguments = step_arguments(StepCase(B=5))
    state_indices = torch.tensor(INDICES)
    storage, pool = state_pool(arguments.pop("state"), state_indices, gap=3)
    eager_storage = storage.clone()
    eager = State(*(eager_storage.as_strided(x.shape, x.stride(), x.storage_offset()) for x in pool))

    def decode(pool: State, state_indices: torch.Tensor) -> torch.Tensor:
        return gated_kalmanet_step(**arguments, state=pool, state_indices=state_indices, inplace=True)[0]

    o = torch.compile(decode, fullgraph=True, backend="aot_eager")(pool, state_indices)
    assert torch.equal(o, decode(eager, state_indices)) and torch.equal(bits(storage), bits(eager_storage))


class Decoder(torch.nn.Module):
    """A prompt's states to the pool and back, and a step over it; the pool is two buffers."""

    def __init__(self) -> None:
        super().__init__()
        _, pool = state_pool(step_arguments(StepCase(B=5))["state"], torch.arange(5), gap=0)
        for name, part in pool._asdict().items():
            self.register_buffer(name, part.nan_to_num())

    def forward(self, token: dict[str, Any], state_indices: torch.Tensor) -> torch.Tensor:
        pool = State(self.S_kk, self.S_kv)
        scatter_states_(pool, state_indices, gather_states(pool, state_indices, state_indices > 0))
        return gated_kalmanet_step(**token, state=pool, state_indices=state_indices, inplace=True)[0]


def token_of_five() -> dict[str, Any]:
    names = ("q", "k", "v", "g", "alpha", "beta")
    return {name: x for name, x in step_arguments(StepCase(B=5)).items() if name in names}


@torch.no_grad()
def test_exported_with_any_number_of_requests() -> None:
    token, rows = token_of_five(), torch.tensor(INDICES)
    B = torch.export.Dim("B", min=2)
    sizes = ({name: {0: B} for name in token}, {0: B})
    exported = torch.export.export(Decoder(), (token, rows), dynamic_shapes=sizes).module()
    module = Decoder()
    for count in (5, 3):
        given = {name: x[:count] for name, x in token.items()}, rows[:count]
        assert torch.equal(exported(*given), module(*given))
    assert all(torch.equal(x, y) for x, y in zip(exported.buffers(), module.buffers(), strict=True))


def test_shapes_alone() -> None:
    token = {name: x.to("meta") for name, x in token_of_five().items()}
    o = Decoder().to("meta")(token, torch.tensor(INDICES).to("meta"))
    assert o.is_meta and o.shape == (5, 2, 16)


def test_no_value_is_read_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of indices and states: the CPU is taken for a device that makes one wait."""
    monkeypatch.delenv("GKA_CHECK_VALUES", raising=False)
    monkeypatch.setattr(checks, "NEVER_WAITING", ())
    arguments = step_arguments(StepCase(B=5))
    state_indices = torch.tensor(INDICES)
    _, pool = state_pool(arguments.pop("state"), state_indices, gap=3)
    with Reads() as reads:
        scatter_states_(pool, state_indices, gather_states(pool, state_indices, state_indices > 0))
        gated_kalmanet_step(**arguments, state=pool, state_indices=state_indices, inplace=True)
    assert not reads.seen


def wrong(name: str) -> dict[str, Any]:
    arguments = step_arguments(StepCase(B=2)) | {"state_indices": torch.tensor([0, 1]), "inplace": True}
    S_kk, S_kv = arguments["state"]
    arguments |= {
        "not in place": {"inplace": False},
        "float": {"state_indices": torch.zeros(2)},
        "list": {"state_indices": [0, 1]},
        "shape": {"state_indices": torch.tensor([[0, 1]])},
        "count": {"state_indices": torch.tensor([0])},
        "beyond": {"state_indices": torch.tensor([-1, 2])},
        "empty": {"state": State(S_kk[:0], S_kv[:0])},
        "rows": {"state": State(S_kk[:1], S_kv)},
        "transposed": {"state": State(S_kk, S_kv.transpose(2, 3).contiguous().transpose(2, 3))},
    }[name]
    return arguments


WRONG = {
    "not in place": (ValueError, r"state_indices is given and inplace is False; expected inplace=True"),
    "float": (TypeError, r"state_indices has dtype torch.float32; expected torch.int32 or torch.int64"),
    "list": (TypeError, r"state_indices is a list; expected a torch.Tensor of integers"),
    "shape": (ValueError, r"state_indices has shape \(1, 2\); expected \[B\]"),
    "count": (ValueError, r"state_indices has shape \(1,\); expected \[2\]"),
    "beyond": (ValueError, r"state_indices has a value of 2; expected less than the pool's 2 rows"),
    "empty": (ValueError, r"the pool has 0 rows; expected at least 1"),
    "rows": (ValueError, r"state.S_kk has shape \(1, 2, 16, 16\); expected \(2, 2, 16, 16\)"),
    "transposed": (ValueError, r"state.S_kv has strides .*; expected each row \(2, 16, 16\) contiguous"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str) -> None:
    kind, message = WRONG[name]
    arguments = wrong(name)
    before = copied(arguments["state"])
    with pytest.raises(kind, match=message):
        gated_kalmanet_step(**arguments)
    assert all(torch.equal(x, old) for x, old in zip(arguments["state"], before, strict=True))


def test_what_does_not_fit_a_prompt_is_refused() -> None:
    state = step_arguments(StepCase(B=2))["state"]
    rows = torch.tensor([0, 1])
    with pytest.raises(TypeError, match=r"has_initial has dtype torch.int64; expected torch.bool"):
        gather_states(state, rows, torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"has_initial has shape \(1,\); expected \(2,\)"):
        gather_states(state, rows, torch.tensor([True]))
    with pytest.raises(ValueError, match=r"state.S_kk is None; expected it exactly if pool.S_kk is given"):
        scatter_states_(state, rows, State(None, state.S_kv))
    with pytest.raises(ValueError, match=r"rows have shape \(1, 2, 16, 16\); expected \(2, 2, 16, 16\)"):
        scatter_rows_(state.S_kv, rows, state.S_kv[:1])
    with pytest.raises(TypeError, match=r"pool is a Tensor; expected a pair \(S_kk, S_kv\)"):
        gather_states(state.S_kv, rows)
    with pytest.raises(ValueError, match="state_indices has a value of 2"):
        scatter_states_(state, torch.tensor([0, 2]), state)


def test_pages_have_gaps() -> None:
    """The pools of these tests are those of a server: rows of one storage, further apart than they are long."""
    _, (S_kk, S_kv) = pages([(2, 4, 4), (2, 4, 5)], torch.float32, "cpu", gap=3)
    assert S_kk.shape == (ROWS, 2, 4, 4) and S_kk.stride(0) == S_kv.stride(0) == 2 * 16 + 2 * 20 + 6
    assert not S_kk.is_contiguous() and S_kk[0].is_contiguous()
