"""Training steps that a GPU replays: each shape of a batch is recorded once, as a CUDA graph.

The host needs longer for its launches than the GPU for the work of a small model. So the first steps of each shape
run as usual: kernels compile, the optimiser makes its state. The next step of this shape is recorded. Later steps
copy their batch into the recorded tensors and replay. All graphs share one pool of memory, since nothing in it is
needed from one step to the next: weights, state of the optimiser and the sum of the losses lie outside. A step
that cannot be recorded runs without a graph, and a message says so.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]
_WARM_UP = 3  # steps of a shape before one is recorded


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """All work of a training runs in one stream that can be recorded, which the default stream cannot."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


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
        graph: whether to record steps; the caller is in `own_stream`.
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
        self.wants_graph, self.graph, self.done = graph, False, 0
        self._pool = torch.cuda.graph_pool_handle() if graph else None
        self._shapes: dict[tuple[torch.Size, ...], _Shape] = {}
        self._total, self._since = torch.zeros((), device=device), 0  # the losses since they were read

    def __call__(self, batch: Batch) -> None:
        """Make a step."""
        self._run(batch)
        self.done += 1
        self._since += 1

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
            # "thread_local": the thread of the backward pass may allocate memory meanwhile
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                self._step(shape.places)
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            self.wants_graph = self.graph = False
            print(f"{self.name}: no CUDA graph, steps are slower: {error}", file=sys.stderr)
            return False
        shape.graph = graph
        self.graph = True
        return True
