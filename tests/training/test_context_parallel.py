"""What the Trainer of shared rows refuses; `tests/cli/test_train_parallel.py` trains with it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.data import IterableDataset

from gka.training.context_parallel import ContextParallelTrainer


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Rows without indices: each process would get its own."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def arguments(**changes: Any) -> Any:
    given = {"world_size": 2, "prediction_loss_only": True, "average_tokens_across_devices": True}
    return SimpleNamespace(**{**given, "label_smoothing_factor": 0.0, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 3}, "processes_per_row is 2; expected a divisor of the number of processes, 3"),
        ({"prediction_loss_only": False}, "prediction_loss_only is False"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices is False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContextParallelTrainer(processes_per_row=2, args=arguments(**changes))


@pytest.mark.parametrize("given", [{"train_dataset": Stream()}, {"eval_dataset": {"a": [1], "b": Stream()}}])
def test_datasets_without_indices(given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(given))} is an IterableDataset"):
        ContextParallelTrainer(processes_per_row=2, args=arguments(), **given)
