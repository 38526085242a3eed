"""Trainings that take turns in one thread, each in a CUDA stream and with random numbers of its own.

The kernels of a small model leave most of a GPU idle. Kernels of several streams run at the same time; those of
several processes take turns. So a training is a generator here, which yields after each step: None, or an event of
the GPU before which it must not go on, since it is far enough ahead. Meanwhile the others go on.

    finish    runs one training to its end
    Player    runs one turn of a training after the other, among others
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Turns = Generator["torch.cuda.Event | None", None, Any]  # returns the result of the training


def finish(turns: Turns, device: torch.device) -> Any:
    """Run a training to its end, in a stream that is not the default one; returns its result."""
    player = Player(turns, device)
    while not player.go_on():
        player.wait()
    return player.result


class Player:
    """A training that goes on turn by turn.

    Args:
        turns: the training.
        device: of the training.
        number: of the stream; trainings that run at the same time have different ones, up to 32.

    Attributes:
        result: of the training, once it has ended.
    """

    def __init__(self, turns: Turns, device: torch.device, number: int = 0) -> None:
        self.result: Any = None
        self._turns, self._device, self._number = turns, device, number
        self._random = _OwnRandomNumbers(device)
        self._waits_for: torch.cuda.Event | None = None
        if device.type == "cuda":
            _stream(number, device).wait_stream(torch.cuda.current_stream(device))

    def may_go_on(self) -> bool:
        """Whether a turn would not run further ahead of the GPU than it shall."""
        return self._waits_for is None or self._waits_for.query()

    def wait(self) -> None:
        """Wait until it may go on."""
        if self._waits_for is not None:
            self._waits_for.synchronize()

    def go_on(self) -> bool:
        """Run the next turn; returns whether the training has ended. Raises what the training raises."""
        with own_stream(self._device, self._number), self._random:
            try:
                self._waits_for = next(self._turns)
            except StopIteration as end:
                self.result = end.value
                return True
        return False


def own_stream(device: torch.device, number: int = 0) -> AbstractContextManager[object]:
    """On a GPU, work inside goes to a stream that can be recorded, which the default stream cannot."""
    return nullcontext() if device.type != "cuda" else torch.cuda.stream(_stream(number, device))


@functools.cache
def _stream(number: int, device: torch.device) -> torch.cuda.Stream:
    """PyTorch keeps memory by stream, and has 32 streams, which new ones share. So one that was made is kept."""
    return torch.cuda.Stream(device)


class _OwnRandomNumbers:
    """Inside, PyTorch's generators have the state in which this object last left them; at first that of now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states = self._read()

    def _read(self) -> list[Tensor]:
        on_device = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
        return [torch.get_rng_state(), *on_device]

    def __enter__(self) -> None:
        host, *on_device = self._states
        torch.set_rng_state(host)
        for state in on_device:
            torch.cuda.set_rng_state(state, self._device)

    def __exit__(self, *_: object) -> None:
        self._states = self._read()
