"""Training with a model that several processes share: FSDP2, tensor and context parallelism on one mesh.

    mesh          processes / (cp tp) x cp x tp, with the names "dp_shard", "cp" and "tp"
    batches       the same for all processes of a sequence, cp tp of them; others have other batches
    weights       split over dp_shard and cp together, and by heads over tp (`gka.distributed.shard_model`)
    checkpoints   those of one process: model.safetensors, and optimizer.pt with moments by number

The first process writes whole checkpoints, so any number of processes resumes them, whatever the mesh.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..distributed import ContextParallel, parallelize, shard_model, tensor_parallel
from .context_parallel import ContextParallelTrainer

WEIGHTS = "model*.safetensors"  # several files, if the model is large
_ON_FIRST = StateDictOptions(full_state_dict=True, cpu_offload=True)


class ShardedTrainer(ContextParallelTrainer):
    """transformers' Trainer, with processes that share the model, and the tokens of every sequence if asked for.

    As first of several base classes it makes another Trainer of this kind. Without processes beside those of "tp",
    the weights are split by heads alone.

    Args:
        context_parallel: cp, the processes that share the tokens of a sequence.
        tensor_parallel: tp, the processes that share the heads.
        **settings: as those of ContextParallelTrainer; with cp = 1 the model may be another one of transformers.
            With args.bf16, FSDP gathers weights in bfloat16.

    Raises:
        ValueError: an error of ContextParallelTrainer, or args.torch_compile is True.
    """

    def __init__(self, *, context_parallel: int = 1, tensor_parallel: int = 1, **settings: Any) -> None:
        if settings["args"].torch_compile:
            raise ValueError("args.torch_compile is True; expected False: FSDP's hooks are not compiled")
        self._cp, self._tp = context_parallel, tensor_parallel
        super().__init__(processes_per_row=context_parallel * tensor_parallel, **settings)

    def _share(self, model: Any, arguments: TrainingArguments, layout: Any) -> DeviceMesh:
        """Shard the model; the mesh."""
        sizes = {"dp_shard": arguments.world_size // self._per_row, "cp": self._cp, "tp": self._tp}
        mesh = init_device_mesh(arguments.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        if self._cp > 1:
            parallelize(model, ContextParallel(mesh["cp"], layout))
        if sizes["dp_shard"] * self._cp == 1:
            tensor_parallel(model, mesh["tp"])
            return mesh
        names = ("dp_shard", *(name for name in ("cp", "tp") if sizes[name] > 1))
        shard_model(model, mesh[names], param_dtype=torch.bfloat16 if arguments.bf16 else None)
        return mesh

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's, with an accelerator that leaves the model where it is and adds up norms."""
        super().create_accelerator_and_postprocess()
        accelerator: Any = self.accelerator
        prepare, clip = accelerator.prepare_model, accelerator.clip_grad_norm_

        def prepare_model(model: Any, device_placement: Any = None, evaluation_mode: bool = False) -> Any:
            return prepare(model, device_placement=False, evaluation_mode=True)  # autocast, and no DDP

        def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
            norm = clip(*args, **kwargs)
            return norm.full_tensor() if isinstance(norm, DTensor) else norm

        accelerator.prepare_model, accelerator.clip_grad_norm_ = prepare_model, clip_grad_norm_

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model by the first process, for `from_pretrained`. Every process calls it."""
        model: Any = self.model
        weights = get_model_state_dict(model, options=_ON_FIRST)
        for tied in getattr(model, "all_tied_weights_keys", None) or {}:
            weights.pop(tied, None)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        named = get_optimizer_state_dict(self.model, self._plain_optimizer(), options=_ON_FIRST)  # type: ignore[arg-type]
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(
                _keyed(named, {name: n for n, name in enumerate(self._names())}), f"{output_dir}/{OPTIMIZER_NAME}"
            )
            torch.save(scheduler.state_dict(), f"{output_dir}/{SCHEDULER_NAME}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Each process reads its parts of the whole weights."""
        files = sorted(Path(resume_from_checkpoint).glob(WEIGHTS))
        if not files:
            raise FileNotFoundError(f"{resume_from_checkpoint}: there is no {WEIGHTS}")
        own: Any = model or self.model
        weights: dict[str, Any] = {name: x for file in files for name, x in load_file(file).items()}
        for tied, name in (getattr(own, "all_tied_weights_keys", None) or {}).items():
            weights.setdefault(tied, weights[name])
        set_model_state_dict(own, weights, options=StateDictOptions(full_state_dict=True))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        read = partial(torch.load, map_location="cpu", weights_only=True)
        found = _keyed(read(f"{checkpoint}/{OPTIMIZER_NAME}", mmap=True), dict(enumerate(self._names())))
        set_optimizer_state_dict(
            self.model,  # type: ignore[arg-type]
            self._plain_optimizer(),
            found,
            options=StateDictOptions(full_state_dict=True),
        )
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(read(f"{checkpoint}/{SCHEDULER_NAME}"))

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser without accelerate's wrapper."""
        wrapped: Any = self.optimizer
        found: torch.optim.Optimizer = getattr(wrapped, "optimizer", wrapped)
        return found

    def _names(self) -> list[str]:
        """The names of the optimiser's parameters, in its order: that of a process alone."""
        model: Any = self.model
        names = {parameter: name for name, parameter in model.named_parameters()}
        return [names[x] for group in self._plain_optimizer().param_groups for x in group["params"]]


def _keyed(moments: dict[str, Any], keys: dict[Any, Any]) -> dict[str, Any]:
    """The state of an optimiser with other keys for its parameters: names for numbers, or numbers for names."""
    return {
        "state": {keys[key]: state for key, state in moments["state"].items()},
        "param_groups": [
            {**group, "params": [keys[key] for key in group["params"]]} for group in moments["param_groups"]
        ],
    }
