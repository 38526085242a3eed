"""The backends of the op, by name, and which one a call gets.

A backend of `gated_kalmanet` is an object with the functions of `Backend`, here modules; `custom_op` calls them. A
new one is a line in `BACKENDS`, and one in `backend_for` if it is to be chosen by itself. One of
`gated_kalmanet_step` is a function of the same arguments.

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
    """What computes the op."""

    def default_chunk_size(self, device: torch.device) -> int:
        """Tokens per chunk where a call does not say how many; 0 where there are no chunks."""
        ...

    def forward(self, arguments: Arguments, *, output_final_state: bool, save: bool) -> Outputs:
        """The op; `save` keeps what `backward` needs."""
        ...

    def empty_saved(self, arguments: Arguments) -> Saved:
        """What `forward` saves, uninitialised: its shapes and dtypes."""
        ...

    @property
    def backward(self) -> Callable[..., Gradients] | None:
        """backward(arguments, *, saved, final, do, d_final); None where autograd differentiates `forward`.

        saved, final: what `forward` saved, and its final (S_kk, S_kv), empty for None. do, d_final: gradients of
        o and of the final states, each of these maybe None.
        """
        ...


@dataclass(frozen=True)
class Entry:
    """A line of the table.

    load: imports the backend. by_autograd: whether its `backward` is None, known without importing it.
    """

    load: Callable[[], Backend]
    by_autograd: bool = False


def _triton() -> Backend:
    from .triton import op  # Triton is imported when it is first asked for

    return op


BACKENDS: dict[str, Entry] = {
    "triton": Entry(_triton),
    "chunked": Entry(lambda: chunked),
    "differentiable": Entry(lambda: differentiable, by_autograd=True),
    "reference": Entry(lambda: reference, by_autograd=True),
}


def backend_for(arguments: Arguments, name: str | None) -> str:
    """The backend of that name; for None kernels where there are some for the tensors, else PyTorch.

    Under a transform of torch.func and in forward mode it is "differentiable". A GPU that gets PyTorch warns once,
    and says what would be fast.

    Raises:
        ValueError: there is none of that name, or it has no derivatives for the transform that is active.
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
    """Warn once that a GPU computes in PyTorch, for derivatives that kernels do not have."""
    q = arguments.q
    if q.device.type == "cuda":
        warn_slow("gated_kalmanet", q.dtype, q.shape[3], arguments.chunk_size, _FEW_DERIVATIVES)


def step_backend_for(arguments: Arguments) -> Callable[..., tuple[Tensor, State]]:
    """The kernel of a step where there is one for the tensors and nobody wants derivatives, else PyTorch."""
    q = arguments.q
    if q.device.type != "cuda" or arguments.needs_gradient() or transforms_active():
        return torch_step.gated_kalmanet_step
    supported, running = supports_step(q.dtype, q.shape[2]), runs_kernels(q.device.index)
    if supported and running:
        return triton_step.gated_kalmanet_step
    warn_slow("gated_kalmanet_step", q.dtype, q.shape[2], why="" if running else _NO_KERNELS)
    return torch_step.gated_kalmanet_step
