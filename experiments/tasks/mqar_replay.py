"""One training of the mqar experiment by replayed steps: its batches and its optimiser, without the Trainer.

    rate of step n of N     peak n / W for n < W, then peak (1 + cos(pi (n - W) / (N - W))) / 2;  W = N / 20
    optimiser               AdamW, betas 0.9 and 0.95, weight decay 0.1 as in the Trainer, gradients clipped to 1

Batches of all tasks of a length have the same shape: their queries are padded to a quarter of the length, with an
answer that the loss ignores. So there are as many graphs as lengths.

Legend: B batch, P queries of a sequence, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import Trainer

from gka.hf import GKAForCausalLM
from gka.nn.decay import decayed

from .asked import Asked, loss
from .gates import has_diverged
from .replay import Batch, ReplayedSteps, parameter_groups
from .stepwise import Stepwise

_CLIP, _DECAY, _BETAS = 1.0, 0.1, (0.9, 0.95)
_LOGS = 40  # losses of a training that are kept


def training(
    model: GKAForCausalLM,
    batches: Iterable[Asked],
    *,
    steps: int,
    learning_rate: float,
    dtype: str,
    device: torch.device,
    name: str,
) -> Stepwise:
    """Train a model in place; the host reads the losses 40 times.

    Args:
        model: with initial weights, on the device.
        batches: `steps` of them.
        steps: N.
        learning_rate: the peak.
        dtype: "float32", or "bfloat16" for autocast.
        device: of the model; on a GPU steps are replayed.
        name: of the training, for messages.

    Returns:
        `loss`: [step, mean loss since the step before it in the list]; `diverged`: the step at which the loss was
        found not to be finite, where the training ended, or None; `graph`: whether steps were replayed.
    """
    cuda = device.type == "cuda"

    def loss_of(batch: Batch) -> Tensor:
        return loss(model, logits_of, Asked(*batch), dtype)

    optimiser = torch.optim.AdamW(
        parameter_groups(model, _is_decayed(model), _DECAY, 0.0, device), betas=_BETAS, fused=True,
        capturable=cuda,
    )  # fmt: skip
    step = ReplayedSteps(loss_of, optimiser, device, graph=cuda, name=name, clip=_CLIP)
    losses, every = list[list[float]](), max(1, steps // _LOGS)
    diverged: int | None = None
    model.train()
    for number, batch in enumerate(batches, 1):
        _set_rate(optimiser, learning_rate * rate_factor(number - 1, steps))
        is_read = number % every == 0 or number == steps
        try:
            behind = step(batch)
        except ValueError:  # off a GPU the op refuses gates that are not finite
            if cuda or not has_diverged(model, partial(loss_of, batch)):
                raise
            diverged = number
            break
        yield step.end() if is_read else behind
        if is_read:
            mean = step.mean_loss()
            if mean is None:
                diverged = number
                break
            losses.append([number, round(mean, 5)])
    step.free()
    return {"loss": losses, "diverged": diverged, "graph": step.graph}


def rate_factor(step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, as a fraction of the peak."""
    warm_up = steps // 20
    if step < warm_up:
        return step / warm_up
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def logits_of(model: GKAForCausalLM, batch: Asked) -> Tensor:
    """[B, P, V]: the output projection is applied to the queries alone."""
    hidden = model.model(batch.inputs, use_cache=False).last_hidden_state
    at = batch.queries.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    logits: Tensor = model.lm_head(hidden.gather(1, at))
    return logits


def _is_decayed(model: GKAForCausalLM) -> Callable[[str, nn.Parameter], bool]:
    """Whether a parameter has weight decay, as the Trainer of the mqar experiment has it."""
    names = set(decayed(Trainer.get_decay_parameter_names(None, model)))  # type: ignore[arg-type]  # reads no self
    return lambda name, _: name in names


def _set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next step; a tensor on a GPU, which a graph reads anew, is filled."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
