"""What a span of tokens adds to the running sums, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Case, make_inputs, relative_error
from torch import Tensor

from gka.distributed import products, sums

CASES = (
    Case(lengths=(23, 23), H=6, Hk=2, D=5, V=9, normalize_qk=True),
    Case(lengths=(17,), D=7, V=3, beta=False),
    Case(lengths=(1,)),
    Case(lengths=(0,)),
)


def tokens_one_by_one(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, normalize_k: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums by the recursion over tokens; all its derivatives are those of autograd."""
    B, T, H = g.shape
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    if normalize_k:
        k = k / (k.norm(dim=3, keepdim=True) + 1e-6)
    S_kk, S_kv = k.new_zeros(B, H, k.shape[3], k.shape[3]), k.new_zeros(B, H, k.shape[3], v.shape[3])
    for t in range(T):
        decay = g[:, t].exp()[..., None, None]
        weight = 1.0 if beta is None else beta[:, t].square()[..., None, None]
        S_kk = decay * S_kk + weight * k[:, t].unsqueeze(3) * k[:, t].unsqueeze(2)
        S_kv = decay * S_kv + weight * k[:, t].unsqueeze(3) * v[:, t].unsqueeze(2)
    return g.sum(1), S_kk, S_kv


def leaves_of(case: Case) -> list[Any]:
    arguments = make_inputs(case)
    return [arguments[name] for name in ("k", "v", "g", "beta")]


def gradients(outputs: Any, leaves: list[Any]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    loss = sum((x * cotangent).sum() for x, cotangent in zip(outputs, cotangents, strict=True))
    wanted = [x for x in leaves if x is not None]
    return list(torch.autograd.grad(loss, wanted, materialize_grads=True))


@pytest.mark.parametrize("block", (sums.BLOCK_ELEMENTS, 300))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_recursion(case: Case, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "BLOCK_ELEMENTS", block)
    leaves = leaves_of(case)
    found = sums.span_sums(*leaves, normalize_k=case.normalize_qk, with_kk=True)
    found = (found.log_decay, found.S_kk, found.S_kv)
    expected = tokens_one_by_one(*leaves, case.normalize_qk)
    for mine, theirs in zip(
        (*found, *gradients(found, leaves)), (*expected, *gradients(expected, leaves)), strict=True
    ):
        assert relative_error(mine, theirs) < 1e-13


def test_without_a_solve() -> None:
    leaves = leaves_of(CASES[0])
    without = sums.span_sums(*leaves, normalize_k=True, with_kk=False)
    assert without.S_kk is None
    expected = tokens_one_by_one(*leaves, True)[::2]
    found = (without.log_decay, without.S_kv)
    for mine, theirs in zip(
        (*found, *gradients(found, leaves)), (*expected, *gradients(expected, leaves)), strict=True
    ):
        assert relative_error(mine, theirs) < 1e-13


def test_tokens_that_forget_and_keys_of_zero() -> None:
    """g = -inf and k = 0 have finite gradients, and nothing before a g of -inf counts."""
    k, v, g, beta = leaves_of(Case(lengths=(9,), D=4, V=4, H=1))
    g = g.detach().index_fill(1, torch.tensor([5]), -torch.inf).requires_grad_()
    k = k.detach().index_fill(1, torch.tensor([7]), 0.0).requires_grad_()
    found = sums.span_sums(k, v, g, beta, normalize_k=True, with_kk=True)
    later = sums.span_sums(*(x[:, 5:] for x in (k, v, g, beta)), normalize_k=True, with_kk=True)
    assert found.log_decay.item() == -torch.inf
    assert relative_error(found.S_kk, later.S_kk) < 1e-15 and relative_error(found.S_kv, later.S_kv) < 1e-15  # type: ignore[arg-type]
    of_all = gradients([found.S_kk, found.S_kv], [k, v, g, beta])
    assert all(x.isfinite().all() for x in of_all)
    assert all((x[:, :5] == 0).all() and (x[:, 8:] != 0).any() for x in (of_all[0], of_all[1], of_all[3]))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_products_of_bfloat16_parts(dtype: torch.dtype) -> None:
    """The operands have 16 bits, whatever a setting says of float32 products; 16-bit operands are exact."""
    a = torch.randn(2, 9, 33, generator=torch.Generator().manual_seed(0))
    b = torch.randn(2, 33, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(sum(x.double() for x in products.bfloat16_parts(b)), b.double())  # type: ignore[arg-type]
    expected = a.double() @ b.double()
    for found in (
        products.product(a, b, torch.float32, True),
        products.product(b.mT, a.mT, torch.float32, True).mT,
    ):
        assert found.dtype == torch.float32
        assert relative_error(found, expected) < 2.0**-16
    assert relative_error(a.bfloat16().float() @ b.float(), expected) > 2.0**-10


@pytest.mark.usefixtures("poisoned", "stand_in")
@pytest.mark.parametrize("with_kk", (True, False))
@pytest.mark.parametrize("case", (*CASES[:3], Case(lengths=(120,), D=33, V=65)), ids=str)
def test_kernels(case: Case, with_kk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums as exact as 16 bits of their operands; gradients as exact as their dtype and these bits."""
    calls = counted_launches(monkeypatch)
    leaves = leaves_of(case)
    leaves = [
        None if x is None else x.detach().to(torch.bfloat16 if x.ndim == 4 else torch.float32) for x in leaves
    ]
    exact = [None if x is None else x.double().requires_grad_() for x in leaves]
    leaves = [None if x is None else x.requires_grad_() for x in leaves]
    found = sums.span_sums(*leaves, normalize_k=case.normalize_qk, with_kk=with_kk)
    expected = tokens_one_by_one(*exact, case.normalize_qk)
    kept = [n for n in range(3) if with_kk or n != 1]
    all_three = (found.log_decay, found.S_kk, found.S_kv)
    mine, theirs = [all_three[n] for n in kept], [expected[n] for n in kept]
    for x, y in zip(mine, theirs, strict=True):
        assert x.dtype == torch.float32 and relative_error(x, y) < 2e-5
    for x, y in zip(gradients(mine, leaves), gradients(theirs, exact), strict=True):
        assert relative_error(x, y) < (3e-3 if x.dtype == torch.bfloat16 else 2e-5), x.shape
    forward = ["sum_blocks", "weigh_tokens", "add_tokens"]
    assert calls == [*forward, "state_pairs", "token_gradients", "sum_blocks", "gate_gradients"]


def counted_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from gka.ops.triton.kernels import span

    calls: list[str] = []

    def launch(kernel: Any, programs: int, **named: Any) -> None:
        calls.append(kernel.fn.__name__)
        original(kernel, programs, **named)

    original = span.launch
    monkeypatch.setattr(span, "launch", launch)
    return calls


@pytest.mark.parametrize("T", (0, 1, 7, sums.SUMMED_AT_ONCE, 2 * sums.SUMMED_AT_ONCE + 3))
def test_sums_after_each_token(T: int) -> None:
    x = torch.randn(2, T, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([x[:, t + 1 :].sum(1) for t in range(T)], 1) if T else x
    found = sums.sums_after(x, 1)
    assert found.shape == x.shape and torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_long_spans_are_summed_in_blocks_of_blocks() -> None:
    T = sums.SUMMED_AT_ONCE**2 + 5
    x = torch.randn(1, T, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = x.flip(1).cumsum(1).flip(1) - x
    assert relative_error(sums.sums_after(x, 1), exact) < 1e-12


def test_no_rows() -> None:
    k, g = torch.zeros(0, 4, 2, 8), torch.zeros(0, 4, 2)
    found = sums.span_sums(k, k, g, None, normalize_k=True, with_kk=True)
    assert found.S_kv.shape == (0, 2, 8, 8)
