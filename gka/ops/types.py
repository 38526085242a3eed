"""Types shared by all backends, and the expansion of key/value heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plan import Plan


class State(NamedTuple):
    """The two running sums that represent the past of a sequence (paper, section 4.1).

    S_kk: [N, H, D, D], sum of decayed beta^2 k k^T, symmetric positive semidefinite; None without a solve
        (`solver_steps=()`).
    S_kv: [N, H, D, V], sum of decayed beta^2 k v^T.

    Both are float32, or float64 for float64 inputs. For decoding both may be bfloat16.
    """

    S_kk: Tensor | None
    S_kv: Tensor

    def to(self, device: torch.device | str) -> State:
        """The same numbers on a device."""
        return State(None if self.S_kk is None else self.S_kk.to(device), self.S_kv.to(device))

    def __repr__(self) -> str:
        """Shapes, dtypes and devices, not the numbers."""
        return f"State(S_kk={shown(self.S_kk)}, S_kv={shown(self.S_kv)})"


def shown(x: Any) -> str:
    """Shape, dtype and device of a tensor, and of the tensors of a list; anything else as it is."""
    if isinstance(x, list):
        return f"[{', '.join(map(shown, x))}]"
    if not isinstance(x, Tensor):
        return repr(x)
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} {x.device}"


class Arguments(NamedTuple):
    """The checked arguments of one call of `gated_kalmanet`, in the form for a backend.

    Nine tensors (S_kk and S_kv are the state before the first token) and the settings. All settings have values
    except chunk_size, where None means the default of the device, and tolerance, where it means fixed counts.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    alpha: Tensor | None
    beta: Tensor | None
    S_kk: Tensor | None
    S_kv: Tensor | None
    cu_seqlens: Tensor | None
    ridge_ratio: float
    solver_steps: tuple[int, ...]
    scale: float
    normalize_qk: bool
    chunk_size: int | None = None
    solver: str = "chebyshev"
    tolerance: float | None = None

    @classmethod
    def of(
        cls,
        tensors: Iterable[Tensor | None],
        ridge_ratio: float,
        solver_steps: Sequence[int],
        scale: float,
        normalize_qk: bool,
        solver: str,
        tolerance: float | None,
        chunk_size: int | None = None,
    ) -> Arguments:
        """From the tensors and from `numbers`, as a custom operator takes them."""
        settings = (ridge_ratio, tuple(solver_steps), scale, normalize_qk, chunk_size, solver, tolerance)
        return cls._make((*tensors, *settings))

    @property
    def numbers(self) -> tuple[float, list[int], float, bool, str, float | None]:
        """The settings but chunk_size, as a custom operator takes them."""
        steps = list(self.solver_steps)
        return self.ridge_ratio, steps, self.scale, self.normalize_qk, self.solver, self.tolerance

    @property
    def plan(self) -> Plan:
        """Solver, steps and tolerance."""
        return Plan(self.solver_steps, self.solver, self.tolerance)

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The tensors that may have gradients, in the order of `Gradients`."""
        return self[:8]

    @property
    def sequences(self) -> int:
        """N."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def needs_gradient(self) -> bool:
        """Whether autograd is on and a tensor requires a gradient."""
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self.differentiable)


class Saved(NamedTuple):
    """Tensors that a backend keeps for its backward pass besides inputs and final states; None if not used.

    x: [B, T, H, D], solutions.
    x_lo: the lower bits of x, to be added to it, if the dtype of x is too short.
    norm: [B, T, H], ||S_kk||_F.
    edge_kk, edge_kv: [., H, D, D or V], states at the borders between parts of the work.
    """

    x: Tensor | None = None
    x_lo: Tensor | None = None
    norm: Tensor | None = None
    edge_kk: Tensor | None = None
    edge_kv: Tensor | None = None


class Outputs(NamedTuple):
    """o [B, T, H, V] in the dtype of q, the final states (None if not requested), and `Saved`."""

    o: Tensor
    S_kk: Tensor | None
    S_kv: Tensor | None
    saved: Saved


class Gradients(NamedTuple):
    """Gradients of the inputs, in their shapes and dtypes; None for inputs that were not given."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    alpha: Tensor | None
    beta: Tensor | None
    S_kk: Tensor | None
    S_kv: Tensor | None


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the states for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def repeat_heads(tensor: Tensor, heads: int, dim: int = 2) -> Tensor:
    """Repeat key/value heads to `heads` query heads: query head h reads head h // (H / Hk)."""
    if tensor.shape[dim] == heads:
        return tensor
    return tensor.repeat_interleave(heads // tensor.shape[dim], dim=dim)
