"""The Triton kernels on a machine without a GPU: through Triton's interpreter against float64, and compiled.

On a machine with a GPU the same kernels run compiled, in `test_gpu.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decode_helpers import (
    STEP_CASES,
    StepCase,
    assert_slow_decay_adds_no_error_up,
    assert_step_equals_the_reference,
    call_step,
    reference_step,
    step_arguments,
)
from families import FAMILIES, Family, family_inputs, first_tokens, gradients_of, with_gates
from forked import run_forked
from helpers import CASES, Case, assert_close, converted, doubled, make_inputs, run

from gka.ops import State, gated_kalmanet

triton = pytest.importorskip("triton", reason="Triton is made for Linux only")
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_gpu.py runs the kernels themselves"),
]
ROOT = Path(__file__).parents[2]
MORE = (
    Case(lengths=(20, 20), H=2, Hk=2, D=40, V=70, alpha=False, beta=False, state=False),
    Case(lengths=(0, 0), H=2, Hk=1, D=5, V=3),
    Case(lengths=(0, 17, 16, 15, 0), H=2, Hk=1, D=5, V=3, packed=True),
)


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=str)
def test_float32_equals_the_chunked_form(case: Case) -> None:
    """To rounding: the truncation of the solve is in both, in dg too."""
    arguments = converted(make_inputs(case), torch.float32)
    chunk_size = 16 if sum(case.lengths) < 60 else 32
    out = run(arguments, backend="triton", chunk_size=chunk_size, solver_steps=(31,))
    ref = run(doubled(arguments), backend="chunked", solver_steps=(31,))
    assert_close(out, ref, 2e-5)


@pytest.mark.parametrize("solver_steps", [(4,), (3, 2)], ids=str)
def test_few_nodes_leave_the_same_everywhere(solver_steps: tuple[int, ...]) -> None:
    """However far x is from the solution, all gradients go with it: dg takes <z, A x>, not <z, q>."""
    arguments = converted(make_inputs(CASES[6]), torch.float32)
    out = run(arguments, backend="triton", chunk_size=16, solver_steps=solver_steps)
    assert_close(out, run(doubled(arguments), backend="chunked", solver_steps=solver_steps), 5e-6)


@pytest.mark.parametrize(
    ("case", "solver_steps"), [*((CASES[n], (16, 16)) for n in (1, 2, 5, 6)), (CASES[6], (8, 8, 8, 8))], ids=str
)
def test_bfloat16_is_refined(case: Case, solver_steps: tuple[int, ...]) -> None:
    arguments = converted(make_inputs(case), torch.bfloat16)
    out = run(arguments, backend="triton", chunk_size=32, solver_steps=solver_steps)
    assert out["o"].dtype == torch.bfloat16
    ref = run(doubled(arguments), backend="chunked", solver_steps=(100,))
    assert_close({"o": out.pop("o")}, {"o": ref.pop("o")}, 4e-3, "o")
    assert_close(out, ref, 1.5e-2)


def test_parts_of_tf32() -> None:
    """Both have at most the 11 + 13 bits of float32, their sum is x, and TF32 holds the first."""
    from tf32_kernel import write_parts

    x = torch.randn(1024, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 1024)
    hi, lo = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    write_parts[(1,)](x, hi, lo)
    assert torch.equal(hi + lo, x) and not (hi.view(torch.int32) & 0x1FFF).any()
    assert lo.any() and (lo.abs() < x.abs() * 2**-10).all()


@pytest.mark.parametrize("random", [False, True], ids=["gates 1", "gates random"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, random: bool) -> None:
    """16-bit accuracy at full width, on fewer tokens than on a GPU."""
    family = FAMILIES[name]
    inputs: dict[str, Any] = with_gates(family_inputs(Family(160, family.m, family.common), H=1), random)
    out = run(inputs, backend="triton", solver_steps=(16, 16))
    exact = run(doubled(inputs), backend="chunked", solver_steps=(200,))
    assert_close({"o": out["o"]}, {"o": exact["o"]}, 2e-3, name)
    assert_close(gradients_of(out), gradients_of(exact), 5e-3, name)


def test_first_tokens() -> None:
    """A norm over a whole sequence would hide its first tokens, which every packed document has."""
    inputs: dict[str, Any] = with_gates(first_tokens(sequences=8, length=3, H=1, seed=1), random=False)
    out = run(inputs, backend="triton", solver_steps=(16, 16))
    exact = run(doubled(inputs), backend="chunked", solver_steps=(200,))
    for place in range(3):
        assert_close({"o": out["o"][:, place::3]}, {"o": exact["o"][:, place::3]}, 4e-3, f"token {place}")


def test_starts_of_packed_sequences() -> None:
    lengths = (1, 2, 64, 70, 3)
    inputs: dict[str, Any] = with_gates(family_inputs(Family(sum(lengths), 4.0), H=1), random=True)
    inputs["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    out = run(inputs, backend="triton", solver_steps=(16, 16))
    exact = run(doubled(inputs), backend="chunked", solver_steps=(200,))
    assert_close(gradients_of(out), gradients_of(exact), 5e-3)


def test_float16() -> None:
    arguments = converted(make_inputs(CASES[6]), torch.float16)
    out = run(arguments, backend="triton", chunk_size=16, solver_steps=(31,))
    assert out["o"].dtype == torch.float16
    assert_close(out, run(doubled(arguments), backend="chunked", solver_steps=(31,)), 2e-3)


def test_float16_with_wide_heads() -> None:
    """Beyond 64 dims the products of the solve are bfloat16, of keys as pairs."""
    case = Case(lengths=(23, 30), H=2, Hk=1, D=70, V=9, packed=True, normalize_qk=True)
    arguments = converted(make_inputs(case), torch.float16)
    out = run(arguments, backend="triton", chunk_size=16, solver_steps=(16, 16))
    exact = run(doubled(arguments), backend="chunked", solver_steps=(100,))
    assert_close({"o": out.pop("o")}, {"o": exact.pop("o")}, 1e-3, "o")
    assert_close(out, exact, 3e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_without_a_solve(packed: bool) -> None:
    case = Case(lengths=(19, 30) if packed else (35,), H=4, Hk=2, D=6, V=9, packed=packed, normalize_qk=True)
    arguments = converted(make_inputs(case), torch.float32)
    arguments["S_kk"] = None
    out = run(arguments, backend="triton", chunk_size=16, solver_steps=())
    assert_close(out, run(doubled(arguments), backend="chunked", solver_steps=()), 5e-6)


LONG_CASES = (
    Case(lengths=(150,), H=2, Hk=1, D=8, V=4),
    Case(lengths=(90, 90), H=1, Hk=1, D=8, V=70, state=False),
    Case(lengths=(40, 0, 3, 50, 0), H=2, Hk=1, D=8, V=4, packed=True),
    Case(lengths=(0, 64, 0, 0, 100, 33, 0), H=1, Hk=1, D=5, V=3, packed=True),
)


@pytest.mark.parametrize(
    ("case", "edges_per_part"),
    [(LONG_CASES[n], edges) for n, edges in ((0, 0), (0, 2), (0, 1000), (1, 2), (2, 0), (2, 1000), (3, 2))],
    ids=str,
)
def test_parts_and_chunk_sizes_change_nothing(
    case: Case, edges_per_part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences that cross several edges, of which much is left there, in parts of one or more spans."""
    from gka.ops.triton import call

    arguments = converted(make_inputs(case), torch.float32)
    with torch.no_grad():
        arguments["g"].mul_(1e-2)
    ref = run(doubled(arguments), backend="chunked", solver_steps=(31,))
    per_edge = case.H * case.D * (case.D + case.V) * 4 * 2
    monkeypatch.setattr(call, "WORKSPACE_BYTES", per_edge * edges_per_part)
    monkeypatch.setattr(call, "EDGE_EVERY", 2)
    out = run(arguments, backend="triton", chunk_size=16, solver_steps=(31,))
    assert_close(out, ref, 1e-5)


def test_zero_keys_and_forgetting() -> None:
    """No NaN where S_kk is zero, and nothing of a past that g = -inf or -1e4 forgot."""
    arguments = converted(make_inputs(Case(lengths=(40,), Hk=2, state=False)), torch.float32)
    with torch.no_grad():
        arguments["k"][:, :5] = 0.0
        arguments["g"][:, 20] = -torch.inf
        arguments["g"][:, 30] = -1e4
    out = run(arguments, backend="triton", chunk_size=16, solver_steps=(31,))
    ref = run(doubled(arguments), backend="chunked", solver_steps=(31,))
    for name in out:
        assert out[name].isfinite().all(), name
    assert_close(out, ref, 2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "no kernels for torch.float64"),
        ({"D": 129, "dtype": torch.bfloat16}, "D = 129"),
        ({"D": 65}, "D = 65"),
        ({"chunk_size": 20}, "chunk_size = 20"),
    ],
)
def test_what_there_are_no_kernels_for(change: dict[str, Any], message: str) -> None:
    q = torch.randn(1, 4, 1, change.get("D", 8), dtype=change.get("dtype", torch.float32))
    with pytest.raises(ValueError, match=message):
        gated_kalmanet(q, q, q, -torch.rand(1, 4, 1), backend="triton", chunk_size=change.get("chunk_size"))


def test_tensors_on_the_cpu_get_an_error() -> None:
    code = (
        "import torch; from gka.ops import gated_kalmanet; q = torch.randn(1, 2, 1, 8);"
        "gated_kalmanet(q, q, q, -torch.rand(1, 2, 1), backend='triton')"
    )
    done = run_forked("-c", code, check=False)
    assert done.returncode != 0 and 'backend "triton" needs tensors on a GPU, not on cpu' in done.stderr


def test_kernels_compile_for_a_gpu() -> None:
    """Those of the whole op without a solve, for Hopper; `.ci/run` compiles all of them for all GPUs."""
    script = """
from benchmarks.compile_kernels import SHARED_LIMIT, compile_case, worse
rows = [row for case in ("bfloat16 D 64 ()", "norm, bfloat16 V 100") for row in compile_case(case, 90)]
assert len(rows) > 4 and all(0 < row["registers"] <= 255 and row["warps"] > 0 for row in rows)
assert all(row["shared bytes"] <= SHARED_LIMIT[90] for row in rows) and not worse(rows, rows)
for key in ("registers", "stack bytes", "shared bytes"):
    better = [{**rows[0], key: rows[0][key] - 1}, *rows[1:]]
    (found,) = worse(rows, better)
    assert key in found and rows[0]["kernel"] in found
    assert not worse(better, rows)
assert len(worse(rows, rows[1:])) == 1
"""
    run_forked("-c", script, folder=ROOT)


def test_rows_of_kernels_are_merged_and_counted() -> None:
    """A run of some kernels replaces their rows alone; what is left over or stands twice is told."""
    script = """
from benchmarks.compile_kernels import left_over, merged
def row(case, kernel, architecture, registers=9):
    return {"case": case, "kernel": kernel, "architecture": architecture, "registers": registers}
gates, padded = "gates", "gates, padded"
old = [row(padded, "b", 80), row(gates, "b", 90), row(gates, "a", 90), row("gone", "a", 80), row(gates, "a", 80)]
new = [row(gates, "a", 90, 7)]
rest = [row(gates, "a", 80)], [row(padded, "b", 80)]
assert merged(old, new, "a") == [*rest[0], *new, row(gates, "b", 90), *rest[1]]
assert merged(old, new) == [*rest[0], *new, *rest[1]]
assert not left_over(old, old[::-1])
(found,) = left_over(old[1:], old)
assert found.startswith("gates, padded, b, 80: a row too many")
assert len(left_over(old, [*old, old[0]])) == 1
"""
    run_forked("-c", script, folder=ROOT)


# ---------------------------------------------------------------------------------------- decode step


@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_step(case: StepCase) -> None:
    from gka.ops.triton import step as triton_step

    assert_step_equals_the_reference(triton_step.gated_kalmanet_step, case)


def test_a_slow_decay_of_a_state_at_rest_adds_no_error_up() -> None:
    from gka.ops.triton import step as triton_step

    assert_slow_decay_adds_no_error_up(triton_step.gated_kalmanet_step)


def test_step_of_a_zero_state_and_forgetting() -> None:
    """No NaN where S_kk is zero, and nothing of a past that g = -inf forgot."""
    from gka.ops.triton import step as triton_step

    arguments = step_arguments(StepCase(alpha=False, normalize_qk=False))
    arguments["k"].zero_()
    arguments["g"].fill_(-torch.inf)
    o, new = call_step(triton_step.gated_kalmanet_step, arguments, inplace=False)
    assert not o.any() and not new.S_kk.any() and not new.S_kv.any()


@pytest.mark.parametrize("Hk", [1, 2])
def test_a_step_reads_the_parts_of_a_split_where_they_are(Hk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from gka.ops.triton import step as triton_step

    arguments = step_arguments(StepCase(B=3, H=2, Hk=Hk, D=5, V=3))
    ref, _ = call_step(triton_step.gated_kalmanet_step, arguments, inplace=False)
    rows = [arguments[name].flatten(1) for name in "qkv"]
    parts = torch.cat([torch.ones(3, 2), *rows], dim=1)[:, 2:].split([x.shape[1] for x in rows], dim=1)
    parts = {name: x.view(3, -1, D) for name, x, D in zip("qkv", parts, (5, 5, 3), strict=True)}
    copied, contiguous = [], torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: (copied.append(x.data_ptr()), contiguous(x))[1])
    o, _ = call_step(triton_step.gated_kalmanet_step, {**arguments, **parts}, inplace=False)
    assert torch.equal(o, ref)
    assert not {x.data_ptr() for x in parts.values()} & set(copied)


def test_step_of_states_that_are_not_contiguous() -> None:
    from gka.ops.triton import step as triton_step

    arguments = step_arguments(StepCase(D=12, V=12))
    expected_o, expected = reference_step(arguments)
    held = State(*(x.transpose(1, 3).contiguous().transpose(1, 3) for x in arguments["state"]))
    arguments["q"] = arguments["q"].transpose(0, 1).contiguous().transpose(0, 1)
    o, new = call_step(triton_step.gated_kalmanet_step, {**arguments, "state": held}, inplace=True)
    assert new.S_kv is held.S_kv
    assert_close({"o": o, **held._asdict()}, {"o": expected_o, **expected._asdict()}, 1e-5)


def test_step_in_place_is_seen_by_autograd() -> None:
    """A graph that saved the state does not go on with what it has become."""
    from gka.ops.triton import step as triton_step

    arguments = step_arguments(StepCase())
    weight = torch.ones_like(arguments["state"].S_kv, requires_grad=True)
    loss = (weight * arguments["state"].S_kv).sum()
    with torch.no_grad():
        call_step(triton_step.gated_kalmanet_step, arguments, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("solver_steps", [[8, 8], []], ids=str)
def test_registration_of_the_step(solver_steps: list[int]) -> None:
    from gka.ops.triton import step as triton_step

    a = step_arguments(StepCase(solver_steps=tuple(solver_steps)))
    tensors = [a.get(n) for n in ("q", "k", "v", "g", "alpha", "beta")]
    given = (*tensors, *a["state"], 0.02, solver_steps, 0.3, True, "chebyshev", None)
    torch.library.opcheck(triton_step._step, given)
    for state_indices in (None, torch.tensor([1, -1])):
        torch.library.opcheck(triton_step._step_, (*given, state_indices))


def test_step_on_the_cpu_gets_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from gka.ops.triton import step as triton_step

    monkeypatch.setattr(triton_step, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs tensors on a GPU, not on cpu"):
        call_step(triton_step.gated_kalmanet_step, step_arguments(StepCase()), inplace=True)


def test_compiling_ahead_covers_a_call() -> None:
    """What forward and backward pass launch, compile_ahead hands to the compiler, with the same specialisation."""
    script = """
from unittest import mock
import torch
from benchmarks.compile_kernels import source, taken_down
from gka.ops import State, gated_kalmanet
from gka.ops.triton import config, op
from gka.ops.types import Arguments, Saved

def keys(launches):
    sources = [(kernel.fn.__name__, source(kernel, values), options) for kernel, values, options in launches]
    return {(name, str(s.signature), str(s.constants), str(s.attrs), str(options)) for name, s, options in sources}

B, T, H, Hk, D, V = 2, 4500, 4, 2, 100, 40
q, k, v = (torch.randn(B, T, h, d, dtype=torch.bfloat16) for h, d in ((H, D), (Hk, D), (Hk, V)))
gates = [torch.rand(B, T, H) for _ in range(3)]
states = [torch.zeros(B, H, D, d) for d in (D, V)]
arguments = Arguments(q, k, v, *gates, *states, None, 0.02, (16, 16), 1.0, True, 64)
for solver_steps in ((16, 16), ()):
    if not solver_steps:
        arguments = arguments._replace(S_kk=None, solver_steps=())
    with mock.patch.object(config, "INTERPRETED", True), taken_down() as run:
        out = op.forward(arguments, output_final_state=True, save=True)
        # As the custom operator hands them over: empty tensors for None.
        *final, x, x_lo, norm, edge_kk, edge_kv = (
            out.o.new_empty(0) if x is None else x for x in (out.S_kk, out.S_kv, *out.saved)
        )
        saved = Saved(x, x_lo, norm, edge_kk, edge_kv)
        op.backward(arguments, saved=saved, final=final, do=out.o, d_final=(None, None))
    with mock.patch.object(config, "INTERPRETED", True), taken_down() as ahead:
        op.compile_ahead(arguments, output_final_state=True, save=True)
    with mock.patch.object(config, "INTERPRETED", True), taken_down() as again:
        op.compile_ahead(arguments, output_final_state=True, save=True)
    assert run and keys(run) <= keys(ahead), keys(run) - keys(ahead)
    assert not again
"""
    run_forked("-c", script, folder=ROOT)
