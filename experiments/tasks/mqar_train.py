"""One training on multi-query associative recall, by transformers' Trainer.

Loss and accuracy are taken at the queries alone: the output projection, most of the work with 8192 tokens, is
applied to these positions only. The label of a position is the answer there, so nothing is shifted by one.

Legend: B batch, T tokens of a sequence, M queries in a batch, V vocabulary size.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import EvalPrediction

from gka.hf import GKAConfig, GKAForCausalLM
from gka.nn.decay import decayed
from gka.training.errors import UserError
from gka.training.trainer import on_one_gpu

from ..peers import mixer_config
from .mqar import IGNORE, MQAR, make_mqar

if TYPE_CHECKING:
    from .mqar_options import Cell, MQAROptions

LAYERS = 2


def model_config(options: MQAROptions, mixer: str, dim: int) -> GKAConfig:
    """The two-layer model of a cell; the mixers differ in what mixes tokens and in nothing else.

    Raises:
        UserError: with the configuration's own message, for sizes that do not fit.
    """
    own: dict[str, Any] = {}
    if options.head_dim is not None:
        own["head_dim"] = options.head_dim
    try:
        return mixer_config(
            mixer,
            vocab_size=options.vocab_size,
            hidden_size=dim,
            intermediate_size=2 * dim,
            num_hidden_layers=LAYERS,
            num_attention_heads=options.heads,
            max_position_embeddings=options.seq_len,
            tie_word_embeddings=True,
            use_cache=False,
            **own,
        )
    except ValueError as error:
        raise UserError(f"the model options do not fit: {error}") from None


def state_size(config: GKAConfig, seq_len: int) -> int:
    """Numbers that one layer keeps of a sequence at its end: its states, or all keys and values."""
    assert config.head_dim is not None
    width = config.num_attention_heads * config.head_dim
    if config.has_attention:
        return 2 * width * seq_len
    return width * config.head_dim * (2 if config.mixer in ("gka", "mamba2") else 1)


def steps_of(options: MQAROptions) -> int:
    """Optimiser steps of a training that does not stop early."""
    return options.epochs * math.ceil(options.train_examples / options.batch_size)


def train_cell(
    options: MQAROptions,
    cell: Cell,
    report: Callable[[int, float | None], None],
) -> dict[str, Any]:
    """Train one model and score it.

    Args:
        options: of the comparison.
        cell: which training.
        report: called after every step with the step and the last test accuracy.

    Returns:
        What goes into the results file: the cell, `accuracy` and `loss` of the last test, `steps`, `parameters`,
        `state_size` of a layer, wall-clock `seconds` and `cpu_seconds`, `history` of [step, accuracy, loss] of
        every test, and the model's `config`.

    A training whose numbers are no longer finite (its rate is too large) ends there: accuracy 0, loss None.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    task: dict[str, Any] = {
        "seq_len": options.seq_len,
        "num_pairs": options.num_pairs,
        "vocab_size": options.vocab_size,
        "power_a": options.power_a,
        "random_non_queries": options.random_non_queries,
        "seed": cell.seed,
    }
    train = make_mqar(options.train_examples, split="train", **task)
    test = make_mqar(options.test_examples, split="test", **task)
    config = model_config(options, cell.mixer, cell.dim)
    set_seed(cell.seed)
    model = GKAForCausalLM(config)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = RecallTrainer(
            model=model,
            args=_arguments(options, cell, scratch),
            train_dataset=Examples(train),
            eval_dataset=Examples(test),
            compute_metrics=_accuracy,
            callbacks=[_Watch(report, options.stop_accuracy)],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
            lost = False
        except FloatingPointError:
            lost = True
    history: list[list[Any]] = [
        [entry["step"], round(entry["eval_accuracy"], 5), round(entry["eval_loss"], 5)]
        for entry in trainer.state.log_history
        if "eval_accuracy" in entry
    ]
    if lost:
        history.append([trainer.state.global_step, 0.0, None])
    steps, accuracy, loss = history[-1]
    return {
        **dataclasses.asdict(cell),
        "accuracy": accuracy,
        "loss": loss,
        "steps": steps,
        "parameters": model.num_parameters(),
        "state_size": state_size(config, options.seq_len),
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "history": history,
        "config": _plain(config),
    }


def answers(model: GKAForCausalLM, inputs: Tensor, asked: Tensor) -> Tensor:
    """Logits at the queries.

    Args:
        model: the language model.
        inputs: [B, T] token ids.
        asked: [B, T] bool, True where a query stands, M times in all.

    Returns:
        [M, V], row by row of the batch.
    """
    positions = asked.flatten().nonzero().squeeze(1)
    hidden = model.model(inputs, use_cache=False).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[positions])


class Examples(Dataset[dict[str, Tensor]]):
    """Examples of the task for the Trainer."""

    def __init__(self, examples: MQAR) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return self.examples.inputs.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.examples.inputs[index], "labels": self.examples.labels[index]}


class RecallTrainer(Trainer):
    """The Trainer with loss and predictions at the queries, and nothing decayed that the layer excludes."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with weight decay: not norms, biases, A_log and dt_bias."""
        return decayed(super().get_decay_parameter_names(model))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean cross entropy at the queries; with outputs also predictions [B, T], IGNORE elsewhere.

        Raises:
            FloatingPointError: it is no longer finite.
        """
        labels = inputs["labels"]
        asked = labels != IGNORE
        try:
            logits = answers(cast("GKAForCausalLM", model), inputs["input_ids"], asked)
        except ValueError as error:  # shapes are always the same, so after a step it is the values: a gate is NaN
            if self.state.global_step == 0:
                raise
            raise FloatingPointError(str(error)) from error
        loss = F.cross_entropy(logits, labels[asked])
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()}")
        if not return_outputs:
            return loss
        predictions = torch.full_like(labels, IGNORE).masked_scatter(asked, logits.argmax(-1))
        return loss, (loss, predictions)


class _Watch(TrainerCallback):
    """Tests at the end too, stops where the task is solved, and tells how far it is.

    Args:
        report: called after every step with the step and the last test accuracy.
        stop_accuracy: a test accuracy above this ends the training.
    """

    def __init__(self, report: Callable[[int, float | None], None], stop_accuracy: float) -> None:
        self.report, self.stop_accuracy = report, stop_accuracy
        self.accuracy: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_evaluate = True
        self.report(state.global_step, self.accuracy)

    def on_evaluate(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        self.accuracy = known["metrics"]["eval_accuracy"]
        if self.accuracy > self.stop_accuracy:
            control.should_training_stop = True


def _arguments(options: MQAROptions, cell: Cell, scratch: str) -> TrainingArguments:
    steps = steps_of(options)
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=cell.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(options.warmup * steps),
        weight_decay=options.weight_decay,
        adam_beta2=options.adam_beta2,
        max_grad_norm=1.0,
        seed=cell.seed,
        data_seed=cell.seed,
        use_cpu=options.device == "cpu" or not torch.accelerator.is_available(),
        eval_strategy="steps",
        eval_steps=options.eval_every,
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
    )
    return on_one_gpu(arguments)


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the queries, of all test sequences together, whose value is right."""
    labels = np.asarray(prediction.label_ids)
    asked = labels != IGNORE
    return {"accuracy": float((np.asarray(prediction.predictions)[asked] == labels[asked]).mean())}


def _plain(config: GKAConfig) -> dict[str, Any]:
    """The fields of the configuration that are its own, as JSON takes them."""
    return {name: getattr(config, name) for name in GKAConfig.__annotations__ if not name.endswith("_token_id")}
