"""The first stage of a distillation: GKA layers learn to match attention layers.

In a forward pass of the frozen teacher, every chosen attention layer and its GKA layer get the same input x:

    error_l = mean (gka_l(x) - attention_l(x))^2        power_l = mean attention_l(x)^2
    loss    = mean_l error_l / power_l

The teacher continues with its own output, so all layers learn at the same time and independently of each other.
The division gives layers with small outputs the same weight as layers with large outputs.

Legend: B batch, T time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..nn.layer import GatedKalmaNet
from .data import TokenBlocks
from .trainer import GKATrainer


class LayerMatching(nn.Module):
    """GKA layers that learn to match the attention layers of a teacher. The teacher is not trained and not saved.

    Args:
        teacher: a causal language model with `model.layers[l].self_attn`; it is frozen.
        layers: GKA layers, by the number of the attention layer to match.
    """

    def __init__(self, teacher: Any, layers: Mapping[int, GatedKalmaNet]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): layer for index, layer in layers.items()})
        self._teacher = (teacher.eval().requires_grad_(False),)  # in a tuple, so that it is not a submodule
        self._hooks = [
            teacher.model.layers[index].self_attn.register_forward_hook(
                functools.partial(self._compare, index), with_kwargs=True
            )
            for index in layers
        ]
        self._training_now = False
        self.errors: dict[int, Tensor] = {}
        self.powers: dict[int, Tensor] = {}

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, use_cache: bool = False
    ) -> dict[str, Tensor]:
        """The loss on tokens [B, T]; `errors` and `powers` get its parts. Labels and use_cache are not used."""
        self.errors, self.powers = {}, {}
        self._training_now = torch.is_grad_enabled()
        with torch.no_grad():
            self._teacher[0].model(input_ids=input_ids, use_cache=False)
        shares = [self.errors[index] / self.powers[index].clamp(min=1e-30) for index in self.errors]
        return {"loss": torch.stack(shares).mean()}

    def _compare(
        self, index: int, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        x = named["hidden_states"] if "hidden_states" in named else arguments[0]
        target = output[0].float()
        with torch.set_grad_enabled(self._training_now):
            self.errors[index] = (self.layers[str(index)](x).float() - target).square().mean()
        self.powers[index] = target.square().mean()

    def close(self) -> None:
        """Restore the teacher."""
        for hook in self._hooks:
            hook.remove()


class MatchTrainer(GKATrainer):
    """A GKATrainer for a LayerMatching. It does not evaluate during training; use `matching_errors`."""

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Does nothing. The Trainer calls it at the end of the schedule."""
        return {}


def _batches(blocks: TokenBlocks, batch_size: int) -> DataLoader[Any]:
    return DataLoader(blocks, batch_size=batch_size)


@torch.no_grad()
def matching_errors(
    matching: LayerMatching, blocks: TokenBlocks, batch_size: int, device: torch.device
) -> dict[int, dict[str, float]]:
    """The mean squared error of every layer, and its ratio to the mean square of the attention output."""
    matching.to(device).eval()
    totals: dict[int, list[float]] = {int(name): [0.0, 0.0] for name in matching.layers}
    for batch in _batches(blocks, batch_size):
        tokens = batch["input_ids"].to(device)
        matching(tokens)
        for index, total in totals.items():
            total[0] += matching.errors[index].item() * len(tokens) / len(blocks)
            total[1] += matching.powers[index].item() * len(tokens) / len(blocks)
    return {
        index: {"mse": error, "share": error / power if power else math.nan}
        for index, (error, power) in totals.items()
    }


@torch.no_grad()
def block_loss(model: Any, blocks: TokenBlocks, batch_size: int) -> float:
    """Nats per token of a causal language model; every block is read separately, as in training."""
    model.eval()
    total = 0.0
    for batch in _batches(blocks, batch_size):
        tokens = batch["input_ids"].to(model.device)
        total += model(input_ids=tokens, labels=tokens, use_cache=False).loss.item() * len(tokens)
    return total / len(blocks)
