"""Training steps that a GPU replays: each shape of a batch is recorded once, as a CUDA graph.

The host needs longer for its launches than the GPU for the work of a small model. So the first steps of each shape
run as usual: kernels compile, the optimiser makes its state. The next step of this shape is recorded. Later steps
copy their batch into the recorded tensors and replay. All graphs share one pool of memory, since nothing in it is
needed from one step to the next: weights, state of the optimiser and the sum of the losses lie outside. A step
that cannot be recorded runs without a graph, and a message says so.

A call returns the end of an earlier step, for which the next call shall wait. A full queue would block it, and the
trainings that run beside it (stepwise.py).
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gka.hf.recording import recording

Batch = tuple[Tensor, ...]
_WARM_UP = 3  # steps of a shape before one is recorded
_AHEAD = 8  # steps of a training that the device has not finished


def parameter_groups(
    model: nn.Module,
    is_decayed: Callable[[str, nn.Parameter], bool],
    weight_decay: float,
    rate: float,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Groups of an optimiser.

    Args:
        model: its parameters are in the groups.
        is_decayed: whether a parameter has weight decay, from its name and itself.
        weight_decay: of these.
        rate: the learning rate; on a GPU it becomes a tensor, which a graph reads anew.
        device: of the model.

    Returns:
        The parameters with weight decay, then those without; no empty group.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[is_decayed(name, parameter)].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decayed else 0.0,
            "lr": torch.tensor(rate, device=device) if device.type == "cuda" else rate,
        }
        for decayed, parameters in groups.items()
        if parameters
    ]


@dataclass
class _Shape:
    """Steps of one shape: how many ran, the tensors that the graph reads, and the graph."""

    done: int = 0
    places: Batch = ()
    graph: Any = None


class ReplayedSteps:
    """The steps of a training: forward, backward, clipping, optimiser.

    Args:
        loss_of: the loss of a batch, a scalar.
        optimiser: for a graph it is capturable, and its rates are tensors.
        device: of the model and the batches.
        graph: whether to record steps; calls are in `stepwise.own_stream`.
        name: of the training, for messages.
        clip: largest norm of all gradients together; None for no clipping.

    Attributes:
        graph: whether steps were replayed, and none had to run without a graph.
    """

    def __init__(
        self,
        loss_of: Callable[[Batch], Tensor],
        optimiser: torch.optim.Optimizer,
        device: torch.device,
        *,
        graph: bool,
        name: str,
        clip: float | None = None,
    ) -> None:
        self.loss_of, self.optimiser, self.device, self.name, self.clip = loss_of, optimiser, device, name, clip
        self.parameters = [p for group in optimiser.param_groups for p in group["params"]]
        self.wants_graph, self.graph = graph, False
        self._pool = torch.cuda.graph_pool_handle() if graph else None
        self._shapes: dict[tuple[torch.Size, ...], _Shape] = {}
        self._sent = deque[torch.cuda.Event]()  # the end of each step on its way
        self._total, self._since = torch.zeros((), device=device), 0  # the losses since they were read

    def __call__(self, batch: Batch) -> torch.cuda.Event | None:
        """Send a step, on a GPU in the current stream.

        Returns:
            The end of the step for which the next call shall wait; None if it need not wait.
        """
        self._run(batch)
        self._since += 1
        if self.device.type != "cuda":
            return None
        self._sent.append(torch.cuda.Event(blocking=True))
        self._sent[-1].record()
        return self._sent.popleft() if len(self._sent) > _AHEAD else None

    def end(self) -> torch.cuda.Event | None:
        """The end of all steps so far, e.g. before their losses are read; None on a CPU."""
        return self._sent[-1] if self._sent else None

    def free(self) -> None:
        """Free the graphs."""
        self._shapes.clear()

    def mean_loss(self) -> float | None:
        """The mean loss of the steps since the last call; None if it is not finite. Waits for the device."""
        mean = self._total.item() / max(1, self._since)
        self._total.zero_()
        self._since = 0
        return mean if math.isfinite(mean) else None

    def _run(self, batch: Batch) -> None:
        if not self.wants_graph:
            self._step(batch)
            return
        shape = self._shapes.setdefault(tuple(x.shape for x in batch), _Shape())
        if shape.done < _WARM_UP:
            shape.done += 1
            self._step(batch)
            return
        if shape.graph is None:
            shape.places = tuple(torch.empty_like(x) for x in batch)
        for place, values in zip(shape.places, batch, strict=True):
            place.copy_(values)
        if shape.graph is None and not self._record(shape):
            self._step(batch)
            return
        shape.graph.replay()

    def _step(self, batch: Batch) -> None:
        loss = self.loss_of(batch)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimiser.step()
        self._total += loss.detach()

    def _record(self, shape: _Shape) -> bool:
        """Record a step of this shape; if that fails, say so and continue without graphs."""
        self.optimiser.zero_grad(set_to_none=True)  # so that gradients get memory of the graph
        torch.cuda.synchronize(self.device)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with recording(graph, stream, self._pool):
                self._step(shape.places)
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            self.wants_graph = self.graph = False
            print(f"{self.name}: no CUDA graph, steps are slower: {error}", file=sys.stderr)
            return False
        shape.graph = graph
        self.graph = True
        return True
