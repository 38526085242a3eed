"""The schedule: where a run ends, and the learning rate on the way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup

from gka.training.learning_rate import Schedule


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(schedule: Schedule, clock: Clock, seconds: list[float], step: int = 0) -> list[float]:
    """Do steps of that many seconds until the schedule is done; the factor that each step used."""
    schedule.start(step)
    factors = []
    for took in seconds:
        factors.append(schedule.factor())
        schedule.begin_step()
        clock.now += took
        step += 1
        schedule.end_step(step)
        if schedule.done:
            break
    return factors


def test_by_steps_it_is_the_cosine_of_transformers() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=10, num_training_steps=100)
    schedule, expected = Schedule(100, None, 0.1), []
    for _ in range(100):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert run(schedule, Clock(), [1.0] * 200) == pytest.approx(expected, abs=1e-12)
    assert schedule.done
    assert schedule.factor() == pytest.approx(0.0, abs=1e-12)


@given(st.lists(st.floats(0.01, 0.6), min_size=200, max_size=200))
def test_by_the_clock_it_ends_in_time_whatever_the_speed(seconds: list[float]) -> None:
    clock = Clock()
    schedule = Schedule(None, 10.0, 0.1, clock=clock)
    factors = run(schedule, clock, seconds * 20)
    assert schedule.done
    assert 10.0 - 0.3 <= schedule.seconds <= 10.0 + 0.6
    assert factors[0] == 0.0
    assert max(factors) > 0.9
    assert factors[-1] < 0.05, "the learning rate has come to its end"


def test_whichever_budget_ends_first() -> None:
    clock = Clock()
    assert len(run(Schedule(20, 1000.0, 0.0, clock=clock), clock, [1.0] * 100)) == 20
    assert len(run(Schedule(200, 30.0, 0.0, clock=clock), clock, [1.0] * 100)) == 30


def test_resumed_it_goes_on_with_what_is_left_of_the_budget() -> None:
    whole, clock = Clock(), Clock()
    factors = run(Schedule(None, 50.0, 0.1, clock=whole), whole, [1.0] * 100)
    first = Schedule(None, 50.0, 0.1, clock=clock)
    before = run(first, clock, [1.0] * 20)
    later = Clock()
    later.now = 99999.0
    second = Schedule(None, 50.0, 0.1, seconds_before=first.seconds, clock=later)
    after = run(second, later, [1.0] * 100, step=20)
    assert before + after == pytest.approx(factors)
    assert second.seconds == 50.0


def test_all_processes_use_the_first_ones_clock() -> None:
    told = []

    def agree(progress: float) -> float:
        told.append(progress)
        return 0.25

    clock = Clock()
    schedule = Schedule(None, 10.0, 0.0, agree=agree, clock=clock)
    run(schedule, clock, [2.0])
    assert told == [0.0, 0.2]
    assert schedule.progress == 0.25


def test_a_budget_must_be_given() -> None:
    with pytest.raises(ValueError, match="max_steps or max_seconds"):
        Schedule(None, None, 0.1)
