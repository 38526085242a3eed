"""One training of the mqar experiment by replayed steps: its batches and its optimiser, without the Trainer.

    rate of step n of N     peak n / W for n < W, then peak (1 + cos(pi (n - W) / (N - W))) / 2;  W = N / 20
    optimiser               AdamW, betas 0.9 and 0.95, weight decay 0.1 as in the Trainer, gradients clipped to 1

Batches of all tasks of a length have the same shape: their queries are padded to a quarter of the length, with an
answer that the loss ignores. So there are as many graphs as lengths.

Legend: B batch, T tokens of a sequence, P pairs and queries of a sequence, V vocabulary size, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from gka.hf import GKAForCausalLM
from gka.nn.decay import decayed
from gka.nn.layer import GatedKalmaNet

from .mqar import IGNORE, MQAR
from .replay import Batch, ReplayedSteps, own_stream

Gates = list[dict[str, list[float]]]  # of every layer: the name of a gate, and its mean of every head
_CLIP, _DECAY, _BETAS = 1.0, 0.1, (0.9, 0.95)
_LOGS = 40  # losses of a training that are kept


class Asked(NamedTuple):
    """`inputs` [B, T], `queries` [B, P] positions of the queries, `values` [B, P] answers or IGNORE; int64."""

    inputs: Tensor
    queries: Tensor
    values: Tensor


def asked(examples: MQAR, pairs: int, device: torch.device) -> Asked:
    """Examples with their P queries, padded to `pairs` queries by position 0 and IGNORE."""
    is_query = examples.labels != IGNORE
    rows = len(examples.inputs)
    positions = is_query.nonzero()[:, 1].view(rows, -1)
    values = examples.labels.gather(1, positions)
    missing = pairs - positions.shape[1]
    parts = examples.inputs, F.pad(positions, (0, missing)), F.pad(values, (0, missing), value=IGNORE)
    return Asked(*(part.to(device) for part in parts))


def train(
    model: GKAForCausalLM,
    batches: Iterable[Asked],
    *,
    steps: int,
    learning_rate: float,
    dtype: str,
    device: torch.device,
    name: str,
) -> dict[str, Any]:
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
    with own_stream(device):
        optimiser = torch.optim.AdamW(
            _groups(model), lr=torch.zeros((), device=device) if cuda else 0.0, betas=_BETAS, fused=True,
            capturable=cuda,
        )  # fmt: skip
        step = ReplayedSteps(_loss_of(model, device, dtype), optimiser, device, graph=cuda, name=name, clip=_CLIP)
        losses, diverged, every = list[list[float]](), None, max(1, steps // _LOGS)
        model.train()
        for number, batch in enumerate(batches, 1):
            _set_rate(optimiser, learning_rate * rate_factor(number - 1, steps))
            try:
                step(batch)
                loss = step.mean_loss() if number % every == 0 or number == steps else 0.0
            except ValueError:  # off a GPU the op refuses gates that are not finite
                if number == 1:
                    raise
                loss = None
            if loss is None:
                diverged = number
                break
            if number % every == 0 or number == steps:
                losses.append([number, round(loss, 5)])
        if cuda:
            torch.cuda.synchronize(device)
    return {"loss": losses, "diverged": diverged, "graph": step.graph}


def rate_factor(step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, as a fraction of the peak."""
    warm_up = steps // 20
    if step < warm_up:
        return step / warm_up
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


@torch.no_grad()
def accuracy(model: GKAForCausalLM, examples: Asked, rows: int, dtype: str) -> float:
    """The fraction of right answers, over batches of `rows` sequences."""
    model.eval()
    device = examples.inputs.device
    right = torch.zeros((), dtype=torch.int64, device=device)
    for parts in zip(*(x.split(rows) for x in examples), strict=True):
        batch = Asked(*parts)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            said = _logits(model, batch).argmax(-1)
        right += (said == batch.values).sum()  # padding, IGNORE, is never said
    return round(right.item() / int((examples.values != IGNORE).sum()), 5)


@torch.no_grad()
def gates_of(model: GKAForCausalLM, inputs: Tensor) -> Gates:
    """Means of the gates of every layer on sequences [B, T], by head.

    Returns:
        For each layer a dict with the gates that it has: "decay", exp of the mean log-decay, the mean "beta" and
        the mean "alpha"; [H] each.
    """
    found: Gates = []

    def read(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(layer, GatedKalmaNet)
        g, alpha, beta = layer._gates(arguments[0], None)
        gates = {"decay": g if layer.a_proj is not None else None, "beta": beta, "alpha": alpha}
        means = {name: gate.mean((0, 1)) for name, gate in gates.items() if gate is not None}
        if "decay" in means:
            means["decay"] = means["decay"].exp()
        found.append({name: [round(x, 6) for x in mean.tolist()] for name, mean in means.items()})

    layers = [module for module in model.modules() if isinstance(module, GatedKalmaNet)]
    hooks = [layer.register_forward_pre_hook(read) for layer in layers]
    try:
        model.eval().model(inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _loss_of(model: GKAForCausalLM, device: torch.device, dtype: str) -> Callable[[Batch], Tensor]:
    def loss_of(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = _logits(model, Asked(*batch))
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[2].flatten(), ignore_index=IGNORE)

    return loss_of


def _logits(model: GKAForCausalLM, batch: Asked) -> Tensor:
    """[B, P, V]: the output projection is applied to the queries alone."""
    hidden = model.model(batch.inputs, use_cache=False).last_hidden_state
    at = batch.queries.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    logits: Tensor = model.lm_head(hidden.gather(1, at))
    return logits


def _groups(model: GKAForCausalLM) -> list[dict[str, Any]]:
    """Parameters with and without weight decay, as the Trainer of the mqar experiment has them."""
    names = set(decayed(Trainer.get_decay_parameter_names(None, model)))  # type: ignore[arg-type]  # reads no self
    parameters = dict(model.named_parameters())
    return [
        {"params": [p for name, p in parameters.items() if name in names], "weight_decay": _DECAY},
        {"params": [p for name, p in parameters.items() if name not in names], "weight_decay": 0.0},
    ]


def _set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next step; a tensor on a GPU, which a graph reads anew, is filled."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
