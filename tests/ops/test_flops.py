"""PyTorch's flop counter: formulas of the operators against a count of the products that are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode_helpers import StepCase, step_arguments
from helpers import CASES, Case, make_inputs
from torch.utils.flop_counter import FlopCounterMode

from gka.ops import State, gated_kalmanet, gated_kalmanet_step
from gka.ops.torch import chunked
from gka.ops.triton import step as triton_step
from gka.ops.types import Arguments


def in_place(added: Any, left: Any, right: Any, **_: Any) -> int:
    """Of a form of baddbmm that PyTorch's own table lacks, from shapes."""
    return 2 * left[0] * left[1] * left[2] * right[2]


def counted(function: Any) -> int:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place}) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("solver_steps", [(5,), (4, 3), ()], ids=str)
@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=str)
def test_the_op(case: Case, solver_steps: tuple[int, ...]) -> None:
    """The formula, against the products of the PyTorch form, which runs below the operator."""
    a, options = make_inputs(case, torch.float32), {"solver_steps": solver_steps, "chunk_size": 16}
    S_kk, S_kv = (a.get("S_kk") if solver_steps else None), a.get("S_kv")
    names = ("q", "k", "v", "g", "alpha", "beta")
    tensors = [None if x is None else x.detach() for x in (*(a[n] for n in names), S_kk, S_kv, a["cu_seqlens"])]
    below = Arguments(*tensors, 0.02, solver_steps, 0.25, False, 16)
    out = chunked.forward(below, output_final_state=False, save=True)
    if solver_steps:
        do = torch.ones_like(out.o)
        gradients = counted(
            lambda: chunked.backward(below, saved=out.saved, final=(do, do), do=do, d_final=(None, None))
        )
    inputs = [a[n] for n in names]
    state = None if S_kv is None else State(S_kk, S_kv)
    cu_seqlens = a["cu_seqlens"]
    forward = counted(lambda: gated_kalmanet(*inputs, initial_state=state, cu_seqlens=cu_seqlens, **options))
    assert forward == counted(lambda: chunked.forward(below, output_final_state=False, save=True)) > 0
    if solver_steps:
        o, _ = gated_kalmanet(*inputs, initial_state=state, cu_seqlens=cu_seqlens, **options)
        assert counted(lambda: o.sum().backward()) == gradients > forward


@torch.no_grad()
@pytest.mark.parametrize("inplace", [False, True], ids=["new states", "in place"])
def test_a_step(monkeypatch: pytest.MonkeyPatch, inplace: bool) -> None:
    """By the kernel the formula, without it the products themselves."""
    arguments = step_arguments(StepCase())
    plain = counted(lambda: gated_kalmanet_step(**arguments))
    monkeypatch.setattr("gka.ops.api.step_backend_for", lambda _: triton_step.gated_kalmanet_step)
    assert counted(lambda: gated_kalmanet_step(**arguments, inplace=inplace)) == plain > 0
