"""Zeros, empty sequences, complete forgetting, extreme decays."""

from __future__ import annotations

import pytest
import torch
from helpers import Case, assert_close, make_inputs, relative_error, run

from gka.ops import State, gated_kalmanet, gated_kalmanet_step

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize_qk", [False, True])
def test_all_zero_keys(dtype: torch.dtype, normalize_qk: bool) -> None:
    arguments = make_inputs(Case(state=False, normalize_qk=normalize_qk), dtype)
    arguments["k"] = torch.zeros_like(arguments["k"])
    out = run(arguments)
    assert all(tensor.isfinite().all() for tensor in out.values())
    assert not out["o"].any() and not out["dalpha"].any()


def test_zero_keys_at_the_start() -> None:
    arguments = make_inputs(Case(lengths=(40,), state=False))
    keys = arguments["k"].detach().clone()
    keys[:, :9] = 0
    arguments["k"] = keys
    out = run(arguments)
    assert not out["o"][:, :9].any() and out["o"][:, 9:].all()
    assert_close(out, run(arguments, backend="reference"), 1e-10)


@pytest.mark.parametrize("packed", [False, True])
def test_no_tokens(packed: bool) -> None:
    case = Case(lengths=(0, 0), packed=packed)
    arguments = make_inputs(case)
    out = run(arguments)
    assert out["o"].shape == (1 if packed else 2, 0, case.H, case.V)
    assert relative_error(out["final S_kk"], arguments["S_kk"]) < 1e-15
    assert relative_error(out["final S_kv"], arguments["S_kv"]) < 1e-15
    assert out["states dS_kv"].any() and out["states dS_kk"].any()


def test_no_sequences() -> None:
    case = Case(lengths=(), packed=True)
    arguments = make_inputs(case)
    out = run(arguments)
    assert out["o"].shape == (1, 0, case.H, case.V) and out["final S_kk"].shape == (0, case.H, case.D, case.D)


def test_one_token_reads_itself() -> None:
    """S_kk = k k^T: with |k| = 1 and q = k, x = k / (1 + a) and o = scale v / (1 + a)."""
    k = torch.nn.functional.normalize(torch.randn(1, 1, 1, 8, dtype=torch.float64), dim=-1)
    v = torch.randn(1, 1, 1, 5, dtype=torch.float64)
    o, _ = gated_kalmanet(k, k, v, torch.zeros(1, 1, 1), solver_steps=(100,), scale=1.0)
    assert relative_error(o, v / 1.02) < 1e-10


def test_minus_infinity_forgets() -> None:
    arguments = make_inputs(Case(lengths=(50,)))
    g = arguments["g"].detach().clone()
    g[:, 20] = -torch.inf
    arguments["g"] = g
    out = run(arguments, chunk_size=16)
    assert all(tensor.isfinite().all() for tensor in out.values())
    later = {n: x[:, 20:] if x is not None and n in ("q", "k", "v", "alpha", "beta") else None
             for n, x in arguments.items() if n != "normalize_qk"}  # fmt: skip
    later["g"] = torch.where(torch.arange(30)[None, :, None] == 0, 0.0, g[:, 20:])
    assert relative_error(out["o"][:, 20:], run(later, chunk_size=16)["o"]) < 1e-10


@pytest.mark.parametrize("decay", [-1e-6, -1.0, -60.0, -5000.0])
def test_extreme_decays_in_float32(decay: float) -> None:
    """Each exponent is a sum of its own: float32 keeps its digits even where the sums are long."""
    arguments = make_inputs(Case(lengths=(130,)), torch.float32)
    arguments["g"] = decay * (1 + torch.rand(arguments["g"].shape, generator=torch.Generator().manual_seed(0)))
    ref = run(
        {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}, solver_steps=(31,)
    )
    out = run(arguments, chunk_size=64)
    dg, dg_ref = out.pop("dg"), ref.pop("dg")
    assert_close(out, ref, 1e-4)
    # dg is a sum of terms of dbeta's size that cancel where the past is forgotten.
    assert (dg - dg_ref).norm() <= 1e-4 * dg_ref.norm() + 3e-5 * ref["dbeta"].norm()


def test_initial_state_is_not_written() -> None:
    arguments = make_inputs(Case(lengths=(5,)))
    state = State(arguments["S_kk"].detach(), arguments["S_kv"].detach())
    before = [tensor.clone() for tensor in state]
    tokens = [arguments[n].detach() for n in ("q", "k", "v", "g", "alpha", "beta")]
    gated_kalmanet(*tokens, initial_state=state, output_final_state=True)
    gated_kalmanet_step(*(x[:, 0] for x in tokens), state=state)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_strided_inputs() -> None:
    arguments = make_inputs(Case(lengths=(33, 33)))
    ref = run(arguments)
    strided = dict(arguments)
    for name in ("q", "k", "v", "g", "alpha", "beta"):
        strided[name] = arguments[name].detach().transpose(1, 2).contiguous().transpose(1, 2)
    tokens = [strided[n].requires_grad_() for n in ("q", "k", "v", "g", "alpha", "beta")]
    o, _ = gated_kalmanet(*tokens, initial_state=State(arguments["S_kk"], arguments["S_kv"]))
    assert relative_error(o, ref["o"]) < 1e-12
    o.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in tokens)


def test_autocast_changes_nothing() -> None:
    arguments = make_inputs(Case(lengths=(20,)), torch.float32)
    ref = run(arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(run(arguments), ref, 1e-12)
        tokens = [arguments[n].detach()[:, 0] for n in ("q", "k", "v", "g", "alpha", "beta")]
        state = State(arguments["S_kk"].detach(), arguments["S_kv"].detach())
        o, _ = gated_kalmanet_step(*tokens, state=state)
    assert relative_error(o, ref["o"][:, 0]) < 1e-5
