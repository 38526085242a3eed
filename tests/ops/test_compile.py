"""torch.compile with fullgraph=True over the op, forward and backward; the op's registration is sound."""

from __future__ import annotations

import pytest
import torch
from helpers import CASES, Case, assert_close, make_inputs, run

from gka.ops import State, custom_op, gated_kalmanet


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[4]], ids=str)
def test_fullgraph(case: Case) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(gated_kalmanet, fullgraph=True, backend="aot_eager")
    arguments = make_inputs(case)
    assert_close(run(arguments, compiled), run(arguments), 1e-12)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=str)
def test_registration(case: Case, backend: str) -> None:
    """torch's own checks: schema, fake implementation against the real one, autograd registration."""
    a = make_inputs(case, torch.float32)
    tensors = [a.get(n) for n in ("q", "k", "v", "g", "alpha", "beta", "S_kk", "S_kv")]
    options = (backend, 0.02, [8, 8], 0.25, True, "chebyshev", None, 16, True, True)
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(custom_op._forward_operator, (*tensors, a["cu_seqlens"], *options), test_utils=utilities)


def test_activation_checkpointing() -> None:
    arguments = make_inputs(Case())

    def checkpointed(*inputs, initial_state, output_final_state, cu_seqlens, normalize_qk):
        def inner(*tensors):
            o, final = gated_kalmanet(
                *tensors[:6],
                initial_state=State(tensors[6], tensors[7]),
                output_final_state=output_final_state,
            )
            return o, *final

        o, S_kk, S_kv = torch.utils.checkpoint.checkpoint(inner, *inputs, *initial_state, use_reentrant=False)
        return o, State(S_kk, S_kv)

    assert_close(run(arguments, checkpointed), run(arguments), 1e-14)
