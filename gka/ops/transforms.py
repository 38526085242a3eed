"""Derivatives beside one backward pass: torch.func, forward mode, gradients of gradients.

An operator with one backward pass serves none of them, and under forward mode it would give a zero tangent in
silence. While one is active, the op and the layer run as plain PyTorch (`torch/differentiable.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad


def transforms_active() -> bool:
    """Whether a transform of torch.func or a level of forward-mode derivatives surrounds the call.

    Under torch.compile only the transforms inside the compiled function count.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor below the wrappers of torch.func: under torch.vmap, the values of all samples."""
    if torch.compiler.is_compiling():
        return tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def has_values(tensor: Tensor) -> bool:
    """Whether numbers stand behind a tensor: not on the meta device, and nothing is fake (`FakeTensorMode`)."""
    if tensor.device.type == "meta" or isinstance(unwrapped(tensor), FakeTensor):
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None


def must_dispatch(tensor: Tensor) -> bool:
    """Whether a call must go through its operator: it is traced, counted, or has no numbers.

    Eager calls do without, because the way through an operator takes longer than the launches behind it.
    """
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or tensor.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
    )


def batch_in_front(size: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The arguments of a rule for torch.vmap, each with the mapped dim of that size in front."""
    pairs = zip(tensors, in_dims, strict=True)
    return [x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in pairs]


def gradients_with_graph(
    function: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of `function` at its inputs that autograd can differentiate again.

    Args:
        function: made of what autograd differentiates as often as wanted.
        inputs: its tensors; None where it takes None.
        cotangents: gradients of its outputs; None for zero. Of more outputs than cotangents the last are ignored.

    Returns:
        A gradient for each input that requires one, None for the others.
    """
    with torch.enable_grad():
        own = [None if x is None else x.view_as(x) for x in inputs]  # no path leads from one input to another
        pairs = [
            (out, cotangent)
            for out, cotangent in zip(function(*own), cotangents, strict=False)
            if out is not None and cotangent is not None and out.requires_grad
        ]
        wanted = [x for x in own if x is not None and x.requires_grad]
        outs, given = [out for out, _ in pairs], [cotangent for _, cotangent in pairs]
        found = iter(torch.autograd.grad(outs, wanted, given, create_graph=True, materialize_grads=True))
    return [next(found) if x is not None and x.requires_grad else None for x in own]
