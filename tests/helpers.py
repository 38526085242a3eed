"""Inputs, the one metric, and the table of cases that the op's tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gka.ops import State, gated_kalmanet

INPUTS = ("q", "k", "v", "g", "alpha", "beta", "S_kk", "S_kv")


@dataclass(frozen=True)
class Case:
    """One shape of problem. lengths: of each sequence; packed into one row if `packed`."""

    lengths: tuple[int, ...] = (70,)
    H: int = 2
    Hk: int = 1
    D: int = 16
    V: int = 16
    packed: bool = False
    alpha: bool = True
    beta: bool = True
    state: bool = True
    normalize_qk: bool = False

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("packed", "alpha", "beta", "state") if getattr(self, name))
        return f"T{'+'.join(map(str, self.lengths))}-H{self.H}/{self.Hk}-D{self.D}-V{self.V}{flags}"


CASES = (
    Case(),
    Case(lengths=(1,)),
    Case(lengths=(37, 37), H=3, Hk=3, D=7, V=11, alpha=False, state=False),
    Case(lengths=(129,), H=4, Hk=2, D=33, V=5, beta=False),
    Case(lengths=(5, 0, 66, 1, 32), H=4, Hk=2, D=12, V=20, packed=True),
    Case(lengths=(64, 3), H=2, Hk=1, D=16, V=8, packed=True, state=False, normalize_qk=True),
    Case(lengths=(33,), H=2, Hk=2, D=24, V=24, normalize_qk=True),
)


def relative_error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref|| in float64; NaN if anything is NaN, 0 for two empty or two zero tensors.

    All inputs are of order one. A reference below 1e-3 is a sum that cancels, like dg of a first token
    without a past; there the error is taken relative to 1e-3.
    """
    assert out.shape == ref.shape, (out.shape, ref.shape)
    difference = torch.linalg.vector_norm(out.double() - ref.double()).item()
    norm = torch.linalg.vector_norm(ref.double()).item()
    return difference if difference == 0.0 else difference / max(norm, 1e-3)


def assert_close(out: Any, ref: Any, bound: float, what: str = "") -> None:
    """Every tensor of `out` is within `bound` of its namesake in `ref`, by `relative_error`."""
    assert out.keys() == ref.keys(), (out.keys(), ref.keys())
    errors = {name: relative_error(out[name], ref[name]) for name in ref}
    wrong = {name: error for name, error in errors.items() if not error <= bound}
    assert not wrong, f"{what} beyond {bound:g}: {wrong} of {errors}"


def make_inputs(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    """Arguments of `gated_kalmanet` for a case; floating tensors ask for gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    N, total = len(case.lengths), sum(case.lengths)
    B, T = (1, total) if case.packed else (N, case.lengths[0])
    q, k, v = normal(B, T, case.H, case.D), normal(B, T, case.Hk, case.D), normal(B, T, case.Hk, case.V)
    if not case.normalize_qk:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    tensors: dict[str, Tensor | None] = {
        "q": q.to(dtype),
        "k": k.to(dtype),
        "v": v.to(dtype),
        "g": torch.nn.functional.logsigmoid(normal(B, T, case.H) + 3),
        "alpha": torch.sigmoid(normal(B, T, case.H)) if case.alpha else None,
        "beta": torch.sigmoid(normal(B, T, case.H)) if case.beta else None,
    }
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if case.state:
        root = normal(N, case.H, case.D, 2 * case.D) / case.D
        tensors["S_kk"] = (root @ root.transpose(-1, -2)).to(state_dtype)
        tensors["S_kv"] = (normal(N, case.H, case.D, case.V) / case.D).to(state_dtype)
    for name, tensor in tensors.items():
        if tensor is not None:
            tensors[name] = tensor.requires_grad_()
    arguments: dict[str, Any] = dict(tensors)
    edges = torch.tensor([0, *case.lengths]).cumsum(0)
    arguments["cu_seqlens"] = edges if case.packed else None
    arguments["normalize_qk"] = case.normalize_qk
    return arguments


def converted(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """q, k, v in `dtype`, the other floating tensors in float32."""
    narrow = {name: dtype if name in ("q", "k", "v") else torch.float32 for name in INPUTS}
    return {
        name: tensor.detach().to(narrow[name]) if name in narrow and tensor is not None else tensor
        for name, tensor in arguments.items()
    }


def doubled(arguments: dict[str, Any]) -> dict[str, Any]:
    """All floating tensors in float64."""
    return {
        n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in arguments.items()
    }


def run(
    arguments: dict[str, Any], function: Any = gated_kalmanet, seed: int = 1, **options: Any
) -> dict[str, Tensor]:
    """Outputs o, final S_kk and S_kv, and the gradients of every input, both ways: see `gradients`."""
    inputs = {name: arguments.get(name) for name in INPUTS}
    leaves = {
        name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items() if tensor is not None
    }
    initial = State(leaves.get("S_kk"), leaves["S_kv"]) if "S_kv" in leaves else None
    o, final = function(
        *(leaves.get(name) for name in ("q", "k", "v", "g", "alpha", "beta")),
        initial_state=initial,
        output_final_state=True,
        cu_seqlens=arguments.get("cu_seqlens"),
        normalize_qk=arguments.get("normalize_qk", False),
        **options,
    )
    outputs = {"o": o, "final S_kv": final.S_kv}
    if final.S_kk is not None:
        outputs["final S_kk"] = final.S_kk
    return {**outputs, **gradients(outputs, leaves, seed)}


def gradients(outputs: dict[str, Tensor], leaves: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Gradients of sum <output, cotangent>, "dq" and so on of o alone, "states dq" of the final states alone.

    One loss through both would hide errors: a random cotangent on the states makes dg a hundred times as large.
    Cotangents are drawn in the order of the names, and rounded to the output's dtype, but at least to bfloat16, so
    that outputs of all dtypes get the same.
    """
    generator = torch.Generator().manual_seed(seed)
    losses: dict[str, Tensor] = {}
    for name in sorted(outputs):
        cotangent = torch.randn(outputs[name].shape, generator=generator, dtype=torch.float64)
        if name == "o":
            cotangent = cotangent.bfloat16().double()
        way = "" if name == "o" else "states "
        losses[way] = losses.get(way, 0.0) + (outputs[name].double() * cotangent.to(outputs[name].device)).sum()
    found = {}
    for way, loss in losses.items():
        # Inputs that a loss does not depend on have gradients all the same, zeros.
        loss = loss + sum((0.0 * leaf.double().sum() for leaf in leaves.values()), start=torch.zeros(()))
        grads = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
        found.update({f"{way}d{name}": grad for name, grad in zip(leaves, grads, strict=True)})
    return found
