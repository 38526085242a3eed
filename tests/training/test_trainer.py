"""The Trainer's step: it waits for the device nowhere, and a loss that is not finite ends the run all the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reads import Reads
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments, default_data_collator

from gka.training.learning_rate import Schedule
from gka.training.trainer import Diverged, GKATrainer, ScheduleCallback


class Watched(GKATrainer):
    """A GKATrainer whose steps are watched for reads."""

    reads: list[str]

    def training_step(self, *args: Any) -> Tensor:
        with Reads() as reads:
            loss = super().training_step(*args)
        self.reads += [*reads.seen, "step"]
        return loss


class Line(nn.Module):
    """loss = (w x)^2, or not a number where x is below 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, labels: Tensor | None = None, use_cache: bool = False) -> dict[str, Tensor]:
        return {"loss": ((self.w * x).square() + 0 * x.sqrt()).mean()}


class Values(Dataset[dict[str, Tensor]]):
    """One value an item; -1 at the places in `bad`."""

    def __init__(self, number: int, bad: tuple[int, ...]) -> None:
        self.x = [-1.0 if index in bad else 1.0 for index in range(number)]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.tensor(self.x[index]), "labels": torch.tensor(0)}


def make_trainer(
    folder: Path, bad: tuple[int, ...] = (), log_every: int = 3, save_every: int = 3, steps: int = 6
) -> Watched:
    """Two items a step, in two batches of one, in the order of the data."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        logging_steps=log_every,
        logging_nan_inf_filter=False,
        save_steps=save_every,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    schedule = Schedule(steps, None, 0.0)
    trainer = Watched(
        schedule=schedule,
        tokens_per_byte=1.0,
        model=Line(),
        args=arguments,
        train_dataset=Values(2 * steps, bad),
        data_collator=default_data_collator,
        callbacks=[ScheduleCallback(schedule)],
    )
    trainer.reads = []
    return trainer


def test_no_step_reads_a_value(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert trainer.reads == ["step"] * 12


def test_reads_do_not_grow_with_steps(tmp_path: Path) -> None:
    """Batches, optimiser and schedule included: only the log at the end reads values."""
    found = []
    for steps in (2, 5):
        trainer = make_trainer(tmp_path, log_every=sys.maxsize, save_every=sys.maxsize, steps=steps)
        with Reads() as reads:
            trainer.train()
        found.append(reads.seen)
    assert found[0] == found[1] != []


def test_reads_are_seen() -> None:
    with Reads() as reads:
        torch.ones(1).item()
        bool(torch.ones(1))
    assert len(reads.seen) >= 2


@pytest.mark.parametrize("place", [7, 8])
def test_the_first_step_of_a_bad_loss_is_named(place: int, tmp_path: Path) -> None:
    """Item 7 is of step 4, item 8 of step 5; the note is read at step 6. Step 3's checkpoint is the last."""
    trainer = make_trainer(tmp_path, bad=(place,))
    with pytest.raises(Diverged, match=rf"diverged at step {place // 2 + 1} \(its loss is nan\)"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_nothing_is_saved_between_two_logs_with_a_bad_loss_before(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, bad=(4,), log_every=sys.maxsize, save_every=2)
    with pytest.raises(Diverged, match="at step 3 "):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
