"""The progress of a training run, and the learning rate at each point.

    p      = step / max_steps, or seconds / max_seconds, whichever is larger
    factor = p / w                                      while p < w, the warm-up
             (1 + cos(pi (p - w) / (1 - w))) / 2        after it, down to 0 at p = 1

With a time budget the factor follows the clock. So a run that becomes slower or faster still ends in time, with
the learning rate at its end. Checkpoints store the seconds spent; a resumed run uses the rest of its budget.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Schedule:
    """Progress of a run against its step and time budgets.

    Args:
        max_steps: optimiser steps of the run, or None.
        max_seconds: wall-clock time of the run, or None; one of the two must be given.
        warmup: w, the fraction of the run with a rising learning rate, in [0, 1).
        seconds_before: seconds of the run before this process.
        agree: function that gives every process of a distributed run the clock of the first process.

    Raises:
        ValueError: neither budget is given.
    """

    def __init__(
        self,
        max_steps: int | None,
        max_seconds: float | None,
        warmup: float,
        *,
        seconds_before: float = 0.0,
        agree: Callable[[float], float] = lambda progress: progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_steps is None and max_seconds is None:
            raise ValueError("max_steps or max_seconds must be given")
        self.max_steps = max_steps
        self.max_seconds = max_seconds
        self.warmup = warmup
        self._before = seconds_before
        self._agree = agree
        self._clock = clock
        self._started: float | None = None
        self._step_began = 0.0
        self.progress = 0.0

    def start(self, step: int) -> None:
        """Start the clock before the first step of this process; `step` steps are done already."""
        self._started = self._clock()
        self.progress = self._at(step, 0.0)

    def begin_step(self) -> None:
        """Record the time at which a step begins."""
        self._step_began = self.seconds

    def end_step(self, step: int) -> None:
        """Update the progress after the optimiser has done `step` steps."""
        self.progress = self._at(step, self.seconds - self._step_began)

    def _at(self, step: int, step_seconds: float) -> float:
        by_steps = step / self.max_steps if self.max_steps else 0.0
        if self.max_seconds is None:
            return min(1.0, by_steps)
        # The budget is met best by stopping now if the next step would end half a step too late.
        over = self.seconds + step_seconds / 2 >= self.max_seconds
        by_time = 1.0 if over else self.seconds / self.max_seconds
        return self._agree(min(1.0, max(by_steps, by_time)))

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, including those before this process."""
        now = 0.0 if self._started is None else self._clock() - self._started
        return self._before + now

    @property
    def done(self) -> bool:
        """Whether a budget is used up."""
        return self.progress >= 1.0

    def factor(self) -> float:
        """The learning rate at this point, as a fraction of its peak, in [0, 1]."""
        if self.progress < self.warmup:
            return self.progress / self.warmup
        return (1 + math.cos(math.pi * (self.progress - self.warmup) / (1 - self.warmup))) / 2
