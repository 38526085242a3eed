"""Trainings of which one thread runs several, a step of each in turn.

Small kernels leave most of a GPU idle. Kernels of several streams run at the same time; those of several processes
do not. So a training is a generator here, which yields after each step. It has a stream and random numbers of its
own. What it yields is the event for which its next step shall wait, so that it is not too far ahead of the GPU.

    finish     runs one training to its end
    Training   runs a step when it is asked to
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Stepwise = Generator["torch.cuda.Event | None", None, Any]  # returns the result of the training


def finish(steps: Stepwise, device: torch.device) -> Any:
    """Run a training to its end, in a stream that is not the default one; returns its result."""
    training = Training(steps, device)
    while not training.advance():
        training.wait()
    return training.result


class Training:
    """A training that runs step by step.

    Args:
        steps: the training.
        device: of the training.
        number: of the stream; trainings that run at the same time have different numbers.

    Attributes:
        result: of the training, once it has ended.
    """

    def __init__(self, steps: Stepwise, device: torch.device, number: int = 0) -> None:
        self.result: Any = None
        self._steps, self._device, self._number = steps, device, number
        self._random = _OwnRandomNumbers(device)
        self._waits_for: torch.cuda.Event | None = None
        if device.type == "cuda":
            _stream(number, device).wait_stream(torch.cuda.current_stream(device))

    def is_ready(self) -> bool:
        """Whether the event for which the next step shall wait is over."""
        return self._waits_for is None or self._waits_for.query()

    def wait(self) -> None:
        """Wait for this event."""
        if self._waits_for is not None:
            self._waits_for.synchronize()

    def advance(self) -> bool:
        """Run the next step; returns whether the training has ended. Raises what the training raises."""
        with own_stream(self._device, self._number), self._random:
            try:
                self._waits_for = next(self._steps)
            except StopIteration as end:
                self.result = end.value
                return True
        return False


def own_stream(device: torch.device, number: int = 0) -> AbstractContextManager[object]:
    """On a GPU, work inside goes to a stream that can be recorded, which the default stream cannot."""
    return nullcontext() if device.type != "cuda" else torch.cuda.stream(_stream(number, device))


@functools.cache
def _stream(number: int, device: torch.device) -> torch.cuda.Stream:
    """A stream that is kept, since PyTorch keeps free memory by stream."""
    return torch.cuda.Stream(device)


class _OwnRandomNumbers:
    """Inside, PyTorch's generators have a state of this object; at first a copy of that of now.

    On a GPU a recorded graph reads seed and offset from the state with which it was recorded, at every replay. So
    this is another state, not another value of the same.
    """

    def __init__(self, device: torch.device) -> None:
        self._host, self._generator = torch.get_rng_state(), None
        if device.type == "cuda":
            torch.cuda.init()  # makes the generators
            index = torch.cuda.current_device() if device.index is None else device.index
            self._generator = torch.cuda.default_generators[index]
            self._own = self._generator.clone_state()

    def __enter__(self) -> None:
        torch.set_rng_state(self._host)
        if self._generator is not None:
            self._others = self._generator.graphsafe_get_state()
            self._generator.graphsafe_set_state(self._own)

    def __exit__(self, *_: object) -> None:
        self._host = torch.get_rng_state()
        if self._generator is not None:
            self._generator.graphsafe_set_state(self._others)
