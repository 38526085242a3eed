"""Training with sequences whose tokens several processes share (docs/parallel.md).

With N processes per sequence, processes 0 to N - 1 get the same batches, the next N get others, and so on. The
model takes whole batches and returns the loss of whole sequences in each process (`gka.distributed.parallelize`).
DDP or FSDP average the gradients over all processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from ..distributed import ContextParallel, parallelize


class ContextParallelTrainer(Trainer):
    """transformers' Trainer, with processes that share the tokens of every sequence.

    As first of several base classes it makes another Trainer of this kind.

    Args:
        processes_per_row: N; the number of processes is a multiple of it.
        layout: which tokens a process has, "contiguous" or "zigzag" (`gka.distributed.ContextParallel`).
        **settings: arguments of the Trainer; the model is a GKAForCausalLM, and args.prediction_loss_only is True.

    Raises:
        ValueError: the number of processes is not a multiple of N, or args.prediction_loss_only or
            args.average_tokens_across_devices is False, or args.label_smoothing_factor is not 0.
        TypeError: a dataset is an IterableDataset, which gives each process other sequences.
    """

    def __init__(self, *, processes_per_row: int, layout: Any = "contiguous", **settings: Any) -> None:
        arguments = settings["args"]
        if arguments.world_size % processes_per_row:
            raise ValueError(
                f"processes_per_row is {processes_per_row}; expected a divisor of the number of processes, "
                f"{arguments.world_size}"
            )
        if not arguments.prediction_loss_only:
            raise ValueError("args.prediction_loss_only is False; expected True: each process has its own logits")
        if not arguments.average_tokens_across_devices:
            raise ValueError("args.average_tokens_across_devices is False; expected True")
        if arguments.label_smoothing_factor:
            raise ValueError(
                f"args.label_smoothing_factor is {arguments.label_smoothing_factor}; expected 0: it needs the "
                "logits of whole sequences"
            )
        for name in ("train_dataset", "eval_dataset"):
            given = settings.get(name)
            for dataset in given.values() if isinstance(given, dict) else [given]:
                if isinstance(dataset, IterableDataset):
                    raise TypeError(
                        f"{name} is an IterableDataset; expected one with indices: its order is shared"
                    )
        self._per_row = processes_per_row
        self._mesh = self._share(settings["model"], arguments, layout)
        super().__init__(**settings)

    def _share(self, model: Any, arguments: TrainingArguments, layout: Any) -> DeviceMesh:
        """Let the model share its tokens; the mesh of the data loaders.

        The names of the dims are accelerate's: its loaders give the processes along "cp" the same batches.
        """
        shape = (arguments.world_size // self._per_row, self._per_row)
        mesh = init_device_mesh(arguments.device.type, shape, mesh_dim_names=("dp_replicate", "cp"))
        parallelize(model, ContextParallel(mesh["cp"], layout))
        return mesh

    def get_cp_size(self) -> int:
        """N. The Trainer counts sequences of a step with it."""
        return self._per_row

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """Labelled tokens in the batches of all processes, each sequence once; releases of the Trainer differ."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        labels = [x["shift_labels"] if "shift_labels" in x else x["labels"][..., 1:] for x in batch_samples]
        number = torch.stack([(x != -100).sum() for x in labels]).sum().to(device)
        total: torch.Tensor = self.accelerator.gather(number).sum()
        return total // self._per_row

    @contextmanager
    def _one_batch_per_row(self) -> Iterator[None]:
        """Data loaders that are made meanwhile follow the mesh."""
        state: Any = self.accelerator.state
        before, state.device_mesh = state.device_mesh, self._mesh
        try:
            yield
        finally:
            state.device_mesh = before

    def get_train_dataloader(self) -> Any:
        """As the Trainer's, with the same batches for the processes of a sequence."""
        with self._one_batch_per_row():
            return super().get_train_dataloader()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with the same batches for the processes of a sequence."""
        with self._one_batch_per_row():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with the same batches for the processes of a sequence."""
        with self._one_batch_per_row():
            return super().get_test_dataloader(*args, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of the Trainer, which adds up those of a sequence's processes; here each has the whole loss."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss / self._per_row
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; of the processes of a sequence, which have the same loss, one counts."""
        self.gather_function = self._gather_of_rows
        return super().evaluation_loop(*args, **kwargs)

    def _gather_of_rows(self, losses: torch.Tensor) -> torch.Tensor:
        """[k] of each process -> the losses of all sequences, without those that fill up the last batch."""
        everyone = self.accelerator.gather(losses).unflatten(0, (-1, self._per_row, len(losses)))
        of_rows: torch.Tensor = everyone[:, 0].flatten()
        state = self.accelerator.gradient_state
        return of_rows[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else of_rows
