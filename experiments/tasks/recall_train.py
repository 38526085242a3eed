"""One training of the recall experiment, as Zoology trains (arXiv 2312.04927): AdamW and epochs on fixed examples.

    learning rate of epoch e    rate (1 + cos(pi e / epochs)) / 2, no warm-up, no clipping
    end                         test accuracy above 99% after an epoch, all epochs, or the rule of `hopeless`

The examples lie on the device and are read in the same order in every epoch, as in Zoology; the last incomplete
batch is left out. Only the numbers of an epoch are read by the host. On a GPU a step is recorded once and replayed
(replay.py); the result says so.

Differences from Zoology: the loss is computed at the queries alone, which changes nothing but the time; on a GPU
in bfloat16 autocast; weight decay leaves out what a layer marks with `_no_weight_decay` (decays, ridges).

Legend: N examples, B batch, T tokens, P pairs and queries of a sequence.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from .asked import Asked, accuracy, asked, loss
from .gates import has_diverged
from .mqar import make_mqar
from .recall_mixers import MIXERS, state_size
from .recall_model import RecallModel
from .replay import Batch, ReplayedSteps, parameter_groups
from .stepwise import Stepwise

RATES = (2.15e-3, 4.64e-4, 1e-2, 1e-4)  # Zoology's four, the likeliest first
SOLVED = 0.99
WEIGHT_DECAY = 0.1
SAVE_EVERY = 20.0  # seconds; a training takes up to some minutes
TELL_EVERY = 60.0  # seconds
History = list[list[Any]]  # [epoch from 1, test accuracy, mean training loss] of every epoch


def make_examples(cell: dict[str, Any], split: str, device: torch.device) -> Asked:
    """The examples of a cell, with int32 inputs: those of its place and seed, whatever the mixer, dim and rate."""
    made = make_mqar(
        cell[f"{split}_examples"],
        seq_len=cell["seq_len"],
        num_pairs=cell["num_pairs"],
        vocab_size=cell["vocab_size"],
        power_a=0.01,
        random_non_queries=False,
        seed=cell["seed"],
        split=split,  # type: ignore[arg-type]
        device=device,
    )
    return asked(made._replace(inputs=made.inputs.int()), cell["num_pairs"], device)


def hopeless(history: History, rivals: Sequence[History], num_pairs: int, epochs: int) -> str | None:
    """Why a training shall end early, or None.

    A model that answers with any value of the sequence is right in 1 of P cases. A training ends

    * from a quarter of the epochs on, if its accuracy is below 1 / (2 P), so that it does not even do that, and
      its loss has fallen by less than 0.2 percent in the last eighth of the epochs. MesaNet once rose from an
      accuracy of 0 to 0.998 in one epoch, after a quarter of them; before, its loss had fallen by 1.1 percent;
    * from half of the epochs on, if its accuracy is below 1.5 / P and, in the last eighth of the epochs, has risen
      by less than 0.01 and its loss has fallen by less than 2 percent: it stays there. Before softmax attention
      solves the task, its accuracy rests at 1 / P for thousands of steps, but its loss falls;
    * after a quarter of the epochs, if it is more than 0.3 below another learning rate at the same epoch, and from
      half of the epochs on, if it is more than 0.1 below.

    Args:
        history: of this training so far.
        rivals: histories of the other learning rates of the same mixer, dim and place.
        num_pairs: P.
        epochs: of a whole training.
    """
    done, back = len(history), max(1, epochs // 8)
    late, accuracy, loss = done >= epochs // 2, history[-1][1], history[-1][2]
    if done < epochs // 4:
        return None
    if done > back:
        _, earlier, earlier_loss = history[-1 - back]
        if accuracy < 0.5 / num_pairs and loss > 0.998 * earlier_loss:
            return "learnt nothing"
        if late and accuracy < min(1.5 / num_pairs, earlier + 0.01) and loss > 0.98 * earlier_loss:
            return "stays at guessing"
    best = max((rival[done - 1][1] for rival in rivals if len(rival) >= done), default=0.0)
    return "behind another rate" if accuracy < best - (0.1 if late else 0.3) else None


def training(cell: dict[str, Any], rivals: Sequence[History], device: torch.device, folder: Path) -> Stepwise:
    """Train the model of a cell; resume where a training of the same cell was stopped.

    Args:
        cell: mixer, dim, seq_len, num_pairs, vocab_size, train_examples, test_examples, batch_size, epochs,
            learning_rate, seed, dtype ("bfloat16" for autocast, or "float32").
        rivals: as for `hopeless`.
        device: device of the training.
        folder: for a checkpoint, at most one in SAVE_EVERY seconds.

    Returns:
        `accuracy` of the last test, `ended` ("solved", "all epochs", "not finite" or the reason of `hopeless`),
        `history`, `seconds` of all epochs, `graph` (whether steps were replayed), `parameters`, `state_size`.
    """
    saved = folder / "training.pt"
    positions = cell["seq_len"] if cell["mixer"] == "attention" else 0
    set_seed(cell["seed"])
    model = RecallModel(MIXERS[cell["mixer"]].build, cell["vocab_size"], cell["dim"], positions).to(device)
    data, test = (make_examples(cell, split, device) for split in ("train", "test"))
    run = Steps(model, cell, device, graph=device.type == "cuda")
    batches = [batch for batch in data.batches(cell["batch_size"]) if len(batch.inputs) == cell["batch_size"]]
    history, before = run.load(saved) if saved.exists() else ([], 0.0)
    ended, start = "all epochs", time.perf_counter()
    last_saved = last_told = start
    for epoch in range(len(history), cell["epochs"]):
        if time.perf_counter() - last_saved > SAVE_EVERY:
            last_saved = time.perf_counter()
            run.save(saved, history, before + last_saved - start)
        for number, behind in enumerate(run.epoch(batches), 1):
            if time.perf_counter() - last_told > TELL_EVERY:
                last_told = time.perf_counter()
                steps = f"step {min(number, len(batches))} of {len(batches)}"
                print(_so_far(cell, history, steps), file=sys.stderr)
            yield behind
        loss = run.loss()
        if loss is None:
            ended = "not finite"
            break
        reached = accuracy(model, logits_of, test, cell["batch_size"], cell["dtype"])
        history.append([epoch + 1, reached, round(loss, 5)])
        if history[-1][1] > SOLVED:
            ended = "solved"
            break
        if reason := hopeless(history, rivals, cell["num_pairs"], cell["epochs"]):
            ended = reason
            break
    run.step.free()
    return {
        "accuracy": history[-1][1] if history else 0.0,
        "ended": ended,
        "history": history,
        "seconds": round(before + time.perf_counter() - start, 1),
        "graph": run.step.graph,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_size": state_size(cell["mixer"], cell["dim"], cell["seq_len"]),
    }


def _so_far(cell: dict[str, Any], history: History, steps: str) -> str:
    """A line for people who wait."""
    name = f"{cell['mixer']}, dim {cell['dim']}, {cell['seq_len']} tokens, {cell['num_pairs']} pairs"
    rate = f"rate {cell['learning_rate']}, seed {cell['seed']}"
    before = f"; accuracy {history[-1][1]} after epoch {history[-1][0]}" if history else ""
    return f"  {name}, {rate}: epoch {len(history) + 1} of {cell['epochs']}, {steps}{before}"


class Steps:
    """The steps of a training.

    Args:
        model: the model, on its device.
        cell: as for `training`.
        device: of the model and the examples.
        graph: whether to record a step as a CUDA graph; the caller is in `stepwise.own_stream`.
    """

    def __init__(self, model: RecallModel, cell: dict[str, Any], device: torch.device, *, graph: bool) -> None:
        self.model, self.cell, self.device = model, cell, device
        self.optimiser = torch.optim.AdamW(
            parameter_groups(model, _is_decayed, WEIGHT_DECAY, cell["learning_rate"], device),
            fused=True,
            capturable=graph,
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, T_max=cell["epochs"])
        self.diverged = False
        self.step = ReplayedSteps(self._loss, self.optimiser, device, graph=graph, name=cell["mixer"])

    def save(self, path: Path, history: History, seconds: float) -> None:
        """Write a checkpoint, whole at every moment."""
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        torch.save({**parts, "history": history, "seconds": seconds}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> tuple[History, float]:
        """Read a checkpoint, before the first step; returns its history and seconds."""
        state = torch.load(path, map_location=self.device)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        return state["history"], state["seconds"]

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimiser": self.optimiser, "schedule": self.schedule}

    def epoch(self, batches: list[Asked]) -> Stepwise:
        """Train an epoch; `loss` tells how it went."""
        self.model.train()
        for batch in batches:
            try:
                behind = self.step(batch)
            except ValueError:  # off a GPU the op refuses gates that are not finite
                if self.device.type == "cuda" or not has_diverged(self.model, partial(self._loss, batch)):
                    raise
                self.diverged = True
                return
            yield behind
        self.schedule.step()
        yield self.step.end()

    def loss(self) -> float | None:
        """The mean loss since the last call, or None if it is not finite."""
        return None if self.diverged else self.step.mean_loss()

    def _loss(self, batch: Batch) -> Tensor:
        return loss(self.model, logits_of, Asked(*batch), self.cell["dtype"])


def logits_of(model: RecallModel, batch: Asked) -> Tensor:
    """[B, P, V], in the dtype of autocast."""
    logits: Tensor = model(batch.inputs, batch.queries)
    return logits


def _is_decayed(_: str, parameter: nn.Parameter) -> bool:
    return not getattr(parameter, "_no_weight_decay", False)
