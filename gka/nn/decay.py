"""The parameters of the decay, A_log and dt_bias: in the dtype of the other weights, and as exact as in float32.

    A_log = parameter + rest          in float32; dt_bias likewise

FSDP shards weights of one dtype, so the two have that of the others. In bfloat16 their rounding alone would move
the logits of a model by 1.5%. A small float32 buffer beside each, `A_log_rest` and `dt_bias_rest`, holds what the
rounding has left out: float32 values come back bit for bit. It is None where nothing is left out, as in float32.
Training changes the parameter, and the rest stays as it is.

Legend: H query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

UNDECAYED = ("A_log", "dt_bias")
REST = "_rest"


def decayed(names: list[str]) -> list[str]:
    """The names of parameters without those that weight decay leaves alone; by name, for FSDP2 drops marks.

    D is Mamba-2's, whose authors leave it alone, too.
    """
    return [name for name in names if name.rsplit(".", 1)[-1] not in (*UNDECAYED, "D")]


class DecayParameters(nn.Module):
    """A module that may have A_log and dt_bias, [H] each, and their rests; see above.

    The parameters carry `_no_weight_decay = True`.
    """

    A_log: nn.Parameter
    dt_bias: nn.Parameter

    def add_decay(self, heads: int, device: torch.device | str | None) -> None:
        """Make the two parameters, [heads] in float32, without values."""
        for name in UNDECAYED:
            self.register_parameter(name, nn.Parameter(torch.empty(heads, device=device, dtype=torch.float32)))
            self.register_buffer(name + REST, None)

    def decay_parameter(self, name: str, dtype: torch.dtype) -> Tensor:
        """A_log or dt_bias, [H], with its rest in float32 or float64."""
        value: Tensor = getattr(self, name).to(dtype)
        rest = getattr(self, name + REST)
        return value if rest is None else value + rest.to(dtype)

    @torch.no_grad()
    def set_decay(self, name: str, value: Tensor) -> None:
        """Set A_log or dt_bias to a value [H] of any dtype; if they are sharded, to that of the first process."""
        parameter = self._parameters[name]
        assert parameter is not None
        value = _beside(value, parameter, send=True)
        parameter.copy_(value)
        setattr(self, name + REST, _left_out(value, parameter.data))

    @torch.no_grad()
    def round_decay(self, dtype: torch.dtype) -> None:
        """Give both parameters another dtype; what 16 bits leave out is their rest."""
        for name, parameter, rest in self._decay():
            if parameter.dtype != dtype:
                value = _sum(parameter.data, rest)
                self._put(name, value.to(dtype))
                setattr(self, name + REST, _left_out(value, value.to(dtype)))

    def _decay(self) -> list[tuple[str, nn.Parameter, Tensor | None]]:
        """Name, parameter and rest of each of the two that is there; FSDP1 takes parameters away."""
        found = [(name, self._parameters.get(name), self._buffers.get(name + REST)) for name in UNDECAYED]
        return [(name, parameter, rest) for name, parameter, rest in found if parameter is not None]

    def _put(self, name: str, value: Tensor) -> None:
        """Give a parameter another value, also one of another dtype."""
        parameter = self._parameters[name]
        assert parameter is not None
        if hasattr(value, "device_mesh"):  # of a DTensor, `data` sets the dtype and leaves the values
            setattr(self, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        else:
            parameter.data = value

    # `.to()` and its like, for all parameters and buffers

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = [(name, parameter.detach(), rest) for name, parameter, rest in self._decay()]
        super()._apply(fn, recurse)
        after = {name: (parameter, rest) for name, parameter, rest in self._decay()}
        for name, old, rest in before:
            new, moved = after[name]
            new._no_weight_decay = True  # type: ignore[attr-defined]
            if new.dtype != old.dtype:
                value = _sum(old, rest).to(new.device)
                if rest is not None:
                    self._put(name, value.to(new.dtype))
                setattr(self, name + REST, _left_out(value, value.to(new.dtype)))
            elif rest is not None and moved is not None and moved.dtype != rest.dtype:
                setattr(self, name + REST, rest.to(moved.device))
        return self

    # Saving: a pair of parameter and rest. Loading: such a pair or the sum alone, in any dtype.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, parameter, rest in self._decay():
            if rest is not None:
                destination[prefix + name + REST] = _beside(rest, parameter)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        rests: dict[str, Tensor | None] = {}
        for name, parameter, _ in self._decay():
            given = state_dict.get(prefix + name)
            if given is None or given.shape != parameter.shape:
                continue  # nn.Module says so
            rest = state_dict.pop(prefix + name + REST, None)
            if given.dtype != parameter.dtype:
                value = _sum(given, rest)
                given = state_dict[prefix + name] = value.to(parameter.dtype)
                rest = _left_out(value, given)
            device = (given if local_metadata.get("assign_to_params_buffers") else parameter).device
            rests[name + REST] = None if rest is None else _all_of(rest).detach().to(device, copy=True)
            self._buffers[name + REST] = None  # for nn.Module, which else misses it
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        self._buffers.update(rests)

    # Parameters are replaced when a model is loaded or copied: the marks are set whenever that happens.

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in nn.Module; marks A_log and dt_bias."""
        super().register_parameter(name, param)
        if name in UNDECAYED and param is not None:
            param._no_weight_decay = True  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in UNDECAYED:
            if self._parameters.get(name) is not None:
                self.register_parameter(name, self._parameters[name])


def with_rests(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A copy of a state_dict in which A_log and dt_bias have their rests added, in float32; it has no rests.

    Args:
        state_dict: of `model`, whole or in part.
        model: has the rests that the state_dict lacks.
    """
    names = [name for name in state_dict if name.rsplit(".", 1)[-1] in UNDECAYED]
    rests, buffers = {name + REST for name in names}, dict(model.named_buffers())
    merged = {name: value for name, value in state_dict.items() if name not in rests}
    for name in names:
        rest = state_dict.get(name + REST, buffers.get(name + REST))
        merged[name] = _sum(state_dict[name], rest) if rest is not None else state_dict[name]
    return merged


@contextmanager
def whole_decay(model: nn.Module) -> Iterator[None]:
    """Within it, A_log and dt_bias of all layers have their rests added, in float32, and there are no rests."""
    layers = [module for module in model.modules() if isinstance(module, DecayParameters)]
    held = [(layer, *each) for layer in layers for each in layer._decay() if each[2] is not None]
    try:
        for layer, name, parameter, rest in held:
            layer._parameters[name] = nn.Parameter(_sum(parameter.detach(), rest), requires_grad=False)
            layer._buffers[name + REST] = None
        yield
    finally:
        for layer, name, parameter, rest in held:
            layer._parameters[name] = parameter
            layer._buffers[name + REST] = rest


def _sum(parameter: Tensor, rest: Tensor | None) -> Tensor:
    """[H] in at least float32."""
    value = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    return value if rest is None else value + _beside(rest.to(value.dtype), value)


def _left_out(value: Tensor, rounded: Tensor) -> Tensor | None:
    """The rest [H] in float32 that makes a value of 16 bits; None for a wider one. Infinity has none."""
    if rounded.dtype not in (torch.bfloat16, torch.float16):
        return None
    return torch.nan_to_num(_all_of(value - rounded.to(value.dtype)), 0.0, 0.0, 0.0).float()


def _all_of(x: Tensor) -> Tensor:
    """All of a tensor that is sharded over processes (a DTensor); another as it is."""
    whole: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return whole


def _beside(rest: Tensor, parameter: Tensor, send: bool = False) -> Tensor:
    """The rest on the parameter's device; a DTensor, whole on every process, where the parameter is one.

    send: whether that of the first process goes to all others.
    """
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or hasattr(rest, "device_mesh"):
        return rest.to(parameter.device)
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(rest.to(parameter.device), mesh, [Replicate()] * mesh.ndim, run_check=send)
