"""Functions with kernels for their values and for one backward pass.

Eager calls are an autograd.Function, because the way through an operator of PyTorch takes longer than the launches
behind it. Calls that are traced go through an operator, of which torch.compile only sees shapes. Gradients of
gradients come from the same function in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..transforms import gradients_with_graph, must_dispatch

_PLAIN = (Tensor, torch.nn.Parameter)
_LIBRARY = torch.library.Library("gka", "FRAGMENT")
Function = Callable[..., tuple[Tensor, ...]]


class KernelFunction:
    """A function of tensors and numbers, called by position; it returns a tuple of tensors.

    Args:
        name: name of the operator, `gka::NAME`; its gradients are `gka::NAME_backward`.
        inputs: the inputs as in a schema, tensors first: ("Tensor x", "Tensor? place", "float eps").
        differentiable: how many of the inputs, the first, have gradients.
        outputs: how many tensors it returns.
        empty: empty(*inputs), the outputs without values.
        forward: forward(*inputs), the outputs.
        backward: backward(*gradients of the outputs, *inputs), the gradients; empty ones for inputs that are None.
        in_pytorch: the outputs, computed by what autograd can differentiate.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        *,
        differentiable: int,
        outputs: int,
        empty: Function,
        forward: Function,
        backward: Function,
        in_pytorch: Function,
    ) -> None:
        self.tensors = sum(text.startswith("Tensor") for text in inputs)
        self.differentiable, self.outputs = differentiable, outputs
        self.backward, self.in_pytorch = backward, in_pytorch
        self.operator = self._define(name, inputs, outputs, forward, empty)
        cotangents = [f"Tensor d{number}" for number in range(outputs)]
        self.backward_operator = self._define(
            f"{name}_backward", [*cotangents, *inputs], differentiable, backward, self._empty_gradients
        )
        torch.library.register_autograd(
            f"gka::{name}", self._differentiate, setup_context=self._save, lib=_LIBRARY
        )
        self.direct = self._without_dispatcher(forward)

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        plain = all(type(x) in _PLAIN for x in inputs if isinstance(x, Tensor))
        direct = plain and not must_dispatch(inputs[0])
        return _in_tuple((self.direct if direct else self.operator)(*inputs))

    def _define(self, name: str, inputs: Sequence[str], outputs: int, function: Function, empty: Function) -> Any:
        """An operator without derivatives. A single output stands alone, because schemas have no tuple of one."""
        alone = outputs == 1
        returned = "Tensor" if alone else f"({', '.join(['Tensor'] * outputs)})"
        _LIBRARY.define(f"{name}({', '.join(inputs)}) -> {returned}", tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, _alone(function) if alone else function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gka::{name}", _alone(empty) if alone else empty, lib=_LIBRARY)
        return getattr(torch.ops.gka, name).default

    def _without_dispatcher(self, forward: Function) -> Callable[..., Any]:
        function = self

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
                function._save(ctx, inputs, ())
                return forward(*inputs)

            @staticmethod
            def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
                return function._differentiate(ctx, *cotangents)

        return Direct.apply

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[: self.tensors])
        ctx.numbers = inputs[self.tensors :]

    def _differentiate(self, ctx: Any, *cotangents: Any) -> tuple[Tensor | None, ...]:
        inputs = (*ctx.saved_tensors, *ctx.numbers)
        variable = inputs[: self.differentiable]
        others = inputs[self.differentiable :]
        found: Sequence[Tensor | None]
        if torch.is_grad_enabled():  # create_graph=True
            found = gradients_with_graph(lambda *given: self.in_pytorch(*given, *others), variable, cotangents)
        else:
            backward = self.backward_operator if must_dispatch(cotangents[0]) else self.backward
            found = _in_tuple(backward(*cotangents, *inputs))
        given = [None if x is None else dx for x, dx in zip(variable, found, strict=True)]
        return *given, *([None] * len(others))

    def _empty_gradients(self, *given: Any) -> tuple[Tensor, ...]:
        like = given[0]
        variable = given[self.outputs : self.outputs + self.differentiable]
        return tuple(like.new_empty(0) if x is None else x.new_empty(x.shape) for x in variable)


def _alone(function: Function) -> Callable[..., Tensor]:
    return lambda *inputs: function(*inputs)[0]


def _in_tuple(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found
