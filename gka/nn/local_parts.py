"""A module whose parameters are sharded computes with the parts that this process has.

Kernels take plain tensors. While such a module runs, the local part of each DTensor stands in its place, in the
module and in the modules below; outside, the parameters are DTensors, for optimisers and checkpoints.

The gradient of a part is often a part itself: each process has seen other heads (sum over them) or other rows of
the batch (mean). `reduced` adds that to the backward pass; `summed` is its transpose:

    reduced: forward x, backward sum over processes         summed: forward sum over processes, backward x
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

_NAME = "_local_parts"
_Held = list[tuple[dict[str, Any], str, Tensor]]


def _all_reduce(x: Tensor, mesh: DeviceMesh) -> Tensor:
    for dim in range(mesh.ndim):
        x = collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", (mesh, dim)))
    return x


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, factor: float) -> Tensor:
        ctx.mesh, ctx.factor = mesh, factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        total = _Summed.apply(grad, ctx.mesh)
        return total if ctx.factor == 1.0 else total * ctx.factor, None, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return _all_reduce(x, mesh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Reduced.apply(grad, ctx.mesh, 1.0), None


class _Arrived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return collectives.wait_tensor(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def arrived(x: Tensor) -> Tensor:
    """x, of which values may be under way, as a plain tensor; not a copy."""
    result: Tensor = _Arrived.apply(x)
    return result


def reduced(x: Tensor, mesh: DeviceMesh, factor: float = 1.0) -> Tensor:
    """x, the same on all processes of a mesh; its gradient is the sum over them, times a factor."""
    result: Tensor = _Reduced.apply(x, mesh, factor)
    return result


def summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of x over the processes of a mesh; its gradient, the same on all, is that of x."""
    result: Tensor = _Summed.apply(x, mesh)
    return result


class LocalParts:
    """Which parts of its tensors a module computes with; `of` makes it do so.

    Attributes:
        summed: name of a parameter -> the mesh over which its gradient is summed.
        averaged: name of a parameter -> the mesh over which its gradient is the mean.
        sliced: name of a buffer -> a mesh of one dim, each process of which uses its slice of dim 0.
        partial: the mesh over which the output of the module is summed, and the gradient of its input,
            `hidden_states`; None if each process has all of both.
    """

    def __init__(self) -> None:
        self.partial: DeviceMesh | None = None
        self.summed: dict[str, DeviceMesh] = {}
        self.averaged: dict[str, DeviceMesh] = {}
        self.sliced: dict[str, DeviceMesh] = {}

    @classmethod
    def of(cls, module: nn.Module) -> LocalParts:
        """The parts of a module; from the first call on, the module computes with them."""
        found = vars(module).get(_NAME)
        if found is None:
            found = cls()
            setattr(module, _NAME, found)
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
        return found

    def enter(self, module: nn.Module) -> _Held:
        """Put the parts in the places of the whole tensors, for `leave`."""
        held: _Held = []
        for prefix, part in module.named_modules():
            for leaf, parameter in list(part._parameters.items()):
                if isinstance(parameter, DTensor):
                    held.append((part._parameters, leaf, parameter))
                    part._parameters[leaf] = self._local(f"{prefix}.{leaf}" if prefix else leaf, parameter)  # type: ignore[assignment]
        for name, mesh in self.sliced.items():
            if (buffer := module._buffers.get(name)) is not None:
                held.append((module._buffers, name, buffer))
                module._buffers[name] = buffer.chunk(mesh.size())[mesh.get_local_rank()]
        return held

    def _local(self, name: str, parameter: DTensor) -> Tensor:
        local = parameter.to_local()
        if name in self.summed:
            local = reduced(local, self.summed[name])
        if name in self.averaged:
            local = reduced(local, self.averaged[name], 1.0 / self.averaged[name].size())
        return local


def leave(held: _Held) -> None:
    """Put the whole tensors back."""
    for place, name, whole in held:
        place[name] = whole


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    parts = getattr(module, _NAME)
    mesh = parts.partial
    if mesh is not None and args:
        args = (reduced(args[0], mesh), *args[1:])
    elif mesh is not None and "hidden_states" in kwargs:
        kwargs["hidden_states"] = reduced(kwargs["hidden_states"], mesh)
    held = parts.enter(module)
    try:
        output = type(module).forward(module, *args, **kwargs)
    finally:
        leave(held)
    if mesh is None:
        return output
    if isinstance(output, Tensor):
        return summed(output, mesh)
    return (summed(output[0], mesh), *output[1:])  # with the state, a part as well
