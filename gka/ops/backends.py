"""The backends of the op, by name, and the choice of the backend for a call.

A backend of `gated_kalmanet` is a module with the functions of `Backend`; `custom_op` calls them. To add a
backend, add a line to `BACKENDS`, and a line to `backend_for` if it shall be chosen automatically. A backend of
`gated_kalmanet_step` is a function with the same arguments.

Legend: N sequences, H query heads, D key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import reference
from .checks import warn_slow
from .torch import chunked, differentiable
from .torch import step as torch_step
from .transforms import transforms_active
from .triton import step as triton_step
from .triton.config import runs_kernels, supports, supports_step
from .types import Arguments, Gradients, Outputs, Saved, State

_NO_KERNELS = "the kernels need Triton and an NVIDIA GPU of compute capability 8.0 or above"
_FEW_DERIVATIVES = "without transforms of torch.func, forward-mode derivatives and create_graph=True"


class Backend(Protocol):
    """The interface of a backend."""

    def default_chunk_size(self, device: torch.device) -> int:
        """Tokens per chunk if a call does not set chunk_size; 0 for a backend without chunks."""
        ...

    def forward(self, arguments: Arguments, *, output_final_state: bool, save: bool) -> Outputs:
        """Compute the op; `save` tells whether to keep the tensors for `backward`."""
        ...

    def empty_saved(self, arguments: Arguments) -> Saved:
        """Uninitialised tensors with the shapes and dtypes that `forward` saves."""
        ...

    @property
    def backward(self) -> Callable[..., Gradients] | None:
        """The function backward(arguments, *, saved, final, do, d_final); None if autograd differentiates
        `forward`.

        saved, final: the saved tensors and the final (S_kk, S_kv) of `forward`, empty for None.
        do, d_final: gradients of o and of the final states; each can be None.
        """
        ...


@dataclass(frozen=True)
class Entry:
    """A line of the table.

    load: imports the backend.
    by_autograd: whether `backward` of the backend is None; stored here to know it without an import.
    """

    load: Callable[[], Backend]
    by_autograd: bool = False


def _triton() -> Backend:
    try:
        from .triton import op  # imports Triton at the first use
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(
            f"backend 'triton' needs the package triton: {error}; leave `backend` out to use PyTorch",
            name="triton",
        ) from None
    return op


BACKENDS: dict[str, Entry] = {
    "triton": Entry(_triton),
    "chunked": Entry(lambda: chunked),
    "differentiable": Entry(lambda: differentiable, by_autograd=True),
    "reference": Entry(lambda: reference, by_autograd=True),
}


def backend_for(arguments: Arguments, name: str | None) -> str:
    """The name of the backend for a call. None chooses kernels if they support the tensors, otherwise PyTorch.

    Under a transform of torch.func and in forward mode it is "differentiable". If a GPU gets PyTorch, a warning
    appears once and names the fast settings.

    Raises:
        ValueError: there is no backend with this name, or it has no derivatives for the active transform.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; expected one of {sorted(BACKENDS)} or None")
    if transforms_active() and name != "reference":
        if name == "triton":
            raise ValueError(
                "backend is 'triton', which runs under no transform of torch.func and has no forward-mode "
                "derivatives; expected None, 'differentiable' or 'reference'"
            )
        warn_slow_derivatives(arguments)
        return "differentiable"
    if name is not None:
        return name
    q, chunk_size = arguments.q, arguments.chunk_size
    if q.device.type != "cuda":
        return "chunked"
    supported, running = supports(q.dtype, q.shape[3], chunk_size), runs_kernels(q.device.index)
    if supported and running:
        return "triton"
    warn_slow("gated_kalmanet", q.dtype, q.shape[3], chunk_size, "" if running else _NO_KERNELS)
    return "chunked"


def warn_slow_derivatives(arguments: Arguments) -> None:
    """Warn once that a GPU computes in PyTorch, because kernels do not have these derivatives."""
    q = arguments.q
    if q.device.type == "cuda":
        warn_slow("gated_kalmanet", q.dtype, q.shape[3], arguments.chunk_size, _FEW_DERIVATIVES)


def step_backend_for(arguments: Arguments) -> Callable[..., tuple[Tensor, State]]:
    """The kernel of a step if it supports the tensors and no derivative is needed, otherwise PyTorch."""
    q = arguments.q
    if q.device.type != "cuda" or arguments.needs_gradient() or transforms_active():
        return torch_step.gated_kalmanet_step
    supported, running = supports_step(q.dtype, q.shape[2]), runs_kernels(q.device.index)
    if supported and running:
        return triton_step.gated_kalmanet_step
    warn_slow("gated_kalmanet_step", q.dtype, q.shape[2], why="" if running else _NO_KERNELS)
    return torch_step.gated_kalmanet_step
