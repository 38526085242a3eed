"""transformers' Trainer with a schedule, complete checkpoints, and progress messages.

The rest is the code of the Trainer: the loop, the optimiser, mixed precision, data parallelism, FSDP.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from ..hf.folders import end_folder
from ..nn.decay import decayed
from .errors import UserError
from .learning_rate import Schedule

SCHEDULE_FILE = "schedule.json"
PARTIAL_CHECKPOINT = "checkpoint.partial"


class Diverged(UserError):
    """The loss of a training is not finite.

    Args:
        step: the first step with such a loss.
        what: a description of the loss, for the message.
    """

    def __init__(self, step: int, what: str) -> None:
        cure = "lower --learning-rate, or raise --warmup; earlier checkpoints are valid"
        super().__init__(f"the training has diverged at step {step} ({what}): {cure}")
        self.step = step


def on_one_gpu(arguments: TrainingArguments) -> TrainingArguments:
    """Change the arguments in place so that a process uses one GPU; torchrun starts more processes."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


class GKATrainer(Trainer):
    """A Trainer for causal language models.

    Args:
        schedule: learning rate and end of the run.
        tokens_per_byte: tokens per byte of the validation text; converts its loss to bits per byte.
        **settings: arguments of transformers' Trainer.
    """

    def __init__(self, *, schedule: Schedule, tokens_per_byte: float, **settings: Any) -> None:
        config: Any = getattr(settings["model"], "config", None)
        use_cache = getattr(config, "use_cache", None)
        super().__init__(**settings)
        if use_cache is not None:
            config.use_cache = use_cache  # otherwise the saved model would generate without a cache
        self.schedule = schedule
        self.tokens_per_byte = tokens_per_byte
        self._first_bad: torch.Tensor | None = None  # [step, loss], on the device; zeros while all are finite

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Names of the parameters with weight decay, without norms, biases and those that the layer excludes."""
        return decayed(super().get_decay_parameter_names(model))

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Let the learning rate follow the schedule, which may depend on the clock."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            assert optimizer is not None  # the Trainer creates it first
            self.lr_scheduler = LambdaLR(optimizer, lambda _step: self.schedule.factor())
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of the Trainer, without filling a decoding cache."""
        inputs = {**inputs, "use_cache": False}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        """The forward and backward pass of the Trainer. A loss that is not finite is recorded on the device.

        Logging and saving read this record, so no checkpoint has weights after such a loss.

        Raises:
            Diverged: the model raises an error for values that are not finite because of earlier steps.
        """
        step = self.state.global_step + 1
        try:
            loss = super().training_step(model, inputs, *rest)
        except ValueError as error:
            self._refuse_diverged()
            if self.state.global_step == 0:
                raise
            # All steps have the same shapes, so an error in a later step comes from bad values.
            raise Diverged(step, str(error)) from error
        seen = self._first_bad
        if seen is None:
            seen = torch.zeros(2, device=loss.device)
        now = torch.stack([torch.full_like(seen[0], step), loss.detach().float()])
        self._first_bad = torch.where((seen[0] == 0) & ~now[1].isfinite(), now, seen)
        return loss

    def _refuse_diverged(self) -> None:
        """Raise Diverged if the loss of a step was not finite. Waits for the device."""
        step, loss = (0.0, 0.0) if self._first_bad is None else self._first_bad.tolist()
        if step:
            raise Diverged(int(step), f"its loss is {loss}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, with bits per byte in addition to the validation loss.

        Raises:
            Diverged: a loss since the last log was not finite, in any process.
        """
        self._refuse_diverged()
        if not math.isfinite(logs.get("loss", 0.0)):  # the mean over all processes
            raise Diverged(self.state.global_step, f"its loss is {logs['loss']}")
        if "eval_loss" in logs:
            logs["eval_bits_per_byte"] = logs["eval_loss"] / math.log(2) * self.tokens_per_byte
        super().log(logs, start_time)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint to a temporary folder and rename it when every process has written its part.

        So a folder checkpoint-N is always complete, even if the run is killed.

        Raises:
            Diverged: the loss of an earlier step was not finite.
        """
        self._refuse_diverged()
        run = Path(str(self.args.output_dir))
        partial, name = run / PARTIAL_CHECKPOINT, f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(partial)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(run)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            sequences = self.get_total_train_batch_size(self.args)  # of a step
            state = json.dumps({"seconds": self.schedule.seconds, "sequences": sequences})
            (partial / name / SCHEDULE_FILE).write_text(state, encoding="utf-8")
            end_folder(partial / name, run / name)
            partial.rmdir()
            rotate_checkpoints(str(run), save_total_limit=self.args.save_total_limit)
        self.accelerator.wait_for_everyone()


class ScheduleCallback(TrainerCallback):
    """Updates the schedule at every step, and ends the run when the schedule ends."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.schedule.start(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.schedule.begin_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.schedule.end_step(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.schedule.done:
            control.should_log = control.should_save = True
            control.should_evaluate = args.eval_strategy != "no"
            control.should_training_stop = True


class ProgressCallback(TrainerCallback):
    """A progress bar in a terminal, or a line from time to time without a terminal.

    Args:
        schedule: the schedule of the run.
        tokens_per_step: tokens per optimiser step, over all processes.
        line_seconds: seconds between two lines without a terminal.
    """

    def __init__(self, schedule: Schedule, tokens_per_step: int, line_seconds: float = 15.0) -> None:
        self.schedule = schedule
        self.tokens_per_step = tokens_per_step
        self.line_seconds = line_seconds
        self.bar: Any = None
        self.loss = self.validation = math.nan
        self._step_seconds = math.nan
        self._began = self._line = 0.0
        self._first_progress = 0.0
        self._first_seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        for logs in state.log_history:
            self.loss = logs.get("loss", self.loss)
            self.validation = logs.get("eval_bits_per_byte", self.validation)
        self._first_progress, self._first_seconds = self.schedule.progress, self.schedule.seconds
        self._line = time.monotonic()
        if sys.stderr.isatty():
            form = "training {percentage:3.0f}% |{bar}| {desc}"
            self.bar = tqdm(total=1.0, bar_format=form, dynamic_ncols=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        took = time.monotonic() - self._began
        known = not math.isnan(self._step_seconds)
        self._step_seconds = 0.9 * self._step_seconds + 0.1 * took if known else took
        if self.bar is not None:
            self.bar.n = self.schedule.progress
            self.bar.set_description_str(self._line_text(state.global_step), refresh=False)
            self.bar.update(0)
        elif time.monotonic() - self._line > self.line_seconds and not self.schedule.done:
            self._print_line(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)
        self.validation = (logs or {}).get("eval_bits_per_byte", self.validation)
        if self.bar is not None:
            self.bar.set_description_str(self._line_text(state.global_step))

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is None and state.is_world_process_zero:
            self._print_line(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the bar and leave it on the screen; also after an error."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _print_line(self, step: int) -> None:
        self._line = time.monotonic()
        percent = f"{100 * self.schedule.progress:3.0f}%"
        print(f"training {percent}  {self._line_text(step)}", file=sys.stderr, flush=True)

    def _line_text(self, step: int) -> str:
        parts = []  # the most important first, because a narrow terminal cuts the end
        if not math.isnan(self.loss):
            parts.append(f"loss {self.loss:.3f}")
        parts.append(f"{self.tokens_per_step / self._step_seconds:,.0f} tokens/s")
        gained = self.schedule.progress - self._first_progress
        if gained > 0:
            spent = self.schedule.seconds - self._first_seconds
            left = round(spent * (1 - self.schedule.progress) / gained)
            parts.append(f"{left // 60}:{left % 60:02d} left")
        if not math.isnan(self.validation):
            parts.append(f"validation {self.validation:.3f} bits/byte")
        of = f"/{self.schedule.max_steps}" if self.schedule.max_steps else ""
        parts.append(f"step {step}{of}")
        return " · ".join(parts)
