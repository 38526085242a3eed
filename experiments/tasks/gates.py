"""Gates of the GKA layers of a model in a forward pass: their means, and whether they are finite.

Legend: B batch, T tokens of a sequence, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gka.hf import GKAForCausalLM
from gka.nn.layer import GatedKalmaNet

Gates = list[dict[str, list[float]]]  # of every layer: the name of a gate, and its mean of every head


@torch.no_grad()
def gates_of(model: GKAForCausalLM, inputs: Tensor) -> Gates:
    """Means of the gates of every layer on sequences [B, T], by head; sets eval mode.

    Returns:
        For each layer a dict with the gates that it has: "decay", exp of the mean log-decay, the mean "beta" and
        the mean "alpha"; [H] each.
    """
    with _read(model) as layers:
        model.eval().model(inputs, use_cache=False)
    means = [{name: gate.mean((0, 1)) for name, gate in gates.items()} for gates in layers]
    for gates in means:
        if "decay" in gates:
            gates["decay"] = gates["decay"].exp()
    return [{name: [round(x, 6) for x in mean.tolist()] for name, mean in gates.items()} for gates in means]


@torch.no_grad()
def has_diverged(model: nn.Module, forward: Callable[[], object]) -> bool:
    """Whether weights, or gates in a forward pass, are not finite.

    Off a GPU the op raises ValueError where gates are not finite. So does many a mistake: this tells them apart.

    Args:
        model: a model; layers that are no GKA layers have no gates here.
        forward: runs the model; it may raise ValueError.
    """
    if any(not parameter.isfinite().all() for parameter in model.parameters()):
        return True
    with _read(model) as layers:
        try:
            forward()
        except ValueError:
            pass  # of the op, after the gates were read, or a mistake
    return any(not gate.isfinite().all() for gates in layers for gate in gates.values())


@contextmanager
def _read(model: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """A list that a forward pass fills: of each layer "decay" (log-decay), "beta" and "alpha", [B, T, H]."""
    found: list[dict[str, Tensor]] = []

    def read(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(layer, GatedKalmaNet)
        g, alpha, beta = layer._gates(arguments[0], None)
        gates = {"decay": g if layer.a_proj is not None else None, "beta": beta, "alpha": alpha}
        found.append({name: gate for name, gate in gates.items() if gate is not None})

    layers = [module for module in model.modules() if isinstance(module, GatedKalmaNet)]
    hooks = [layer.register_forward_pre_hook(read) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
