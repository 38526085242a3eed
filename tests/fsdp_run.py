"""A small training by transformers' own Trainer, alone or under FSDP2 in several CPU processes.

    torchrun --nproc_per_node 2 -m fsdp_run FOLDER    what tests/training/test_fsdp.py needs, in one launch

accelerate knows FSDP on accelerators only: on CPUs its AcceleratorState keeps the type MULTI_CPU, drops the plugin
and the Trainer runs plain data parallelism without a word. `fsdp_on_cpus` gives these processes the type FSDP, as
accelerate does for GPUs; all else is accelerate's code.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import accelerate.state
import torch
from accelerate.utils import DistributedType
from model_helpers import SIZES, tiny_config
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments, set_seed

from gka import GKAForCausalLM
from gka.training.fsdp_checkpoint import fit_checkpoint

STEPS, SAVED, TOKENS = 6, 3, 16


def fsdp_on_cpus() -> None:
    """Let accelerate's FSDP run on CPU processes."""
    original = accelerate.state.AcceleratorState.__init__

    @functools.wraps(original)
    def replaced(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    accelerate.state.AcceleratorState.__init__ = replaced  # type: ignore[method-assign]


def make_trainer(folder: Path, bf16: bool, fsdp: bool) -> Trainer:
    """A trainer of a hybrid, with gradient checkpointing; one step is four rows, over all processes.

    Under FSDP the loss is computed in chunks, which uses the sharded head several times.
    """
    set_seed(0)
    model = GKAForCausalLM(tiny_config("hybrid", initializer_range=0.1))
    model.set_loss_chunk(7 if fsdp else None)
    tokens = torch.randint(1, SIZES["vocab_size"], (64, TOKENS), generator=torch.Generator().manual_seed(0))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    sharding: dict[str, Any] = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["GKABlock"]}}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4 // processes,
        max_steps=STEPS,
        save_steps=SAVED,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        bf16=bf16,
        use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        report_to=[],
        disable_tqdm=True,
        **(sharding if fsdp else {}),
    )
    return Trainer(model=model, args=arguments, train_dataset=[{"input_ids": x, "labels": x} for x in tokens])


def losses(history: list[dict[str, Any]]) -> dict[str, float]:
    """Losses by step of a trainer's log_history, in the form that JSON keeps."""
    return {str(logs["step"]): logs["loss"] for logs in history if "loss" in logs}


def run(folder: Path, bf16: bool, fsdp: bool, resumed: Path | None = None) -> Trainer:
    """Train, from a checkpoint of either kind if one is given; the trainer at the end."""
    trainer = make_trainer(folder, bf16, fsdp)
    trainer.train(resume_from_checkpoint=None if resumed is None else fit_checkpoint(trainer, resumed))
    return trainer


def main() -> None:
    """Of both precisions a run under FSDP2, and one that resumes the checkpoint of the single process."""
    place = Path(sys.argv[1])
    seen: dict[str, Any] = {"without the type": bool(make_trainer(place / "none", False, True).is_fsdp_enabled)}
    accelerate.state.AcceleratorState._reset_state()
    fsdp_on_cpus()
    for precision in ("float32", "bfloat16"):
        bf16 = precision == "bfloat16"
        whole = run(place / f"fsdp {precision}", bf16, True)
        parameters = dict(whole.model.named_parameters())  # type: ignore[union-attr]
        resumed = run(
            place / f"fsdp resumed {precision}", bf16, True, place / f"one {precision}" / f"checkpoint-{SAVED}"
        )
        resumed.save_model()
        seen[precision] = {
            "losses": losses(whole.state.log_history),
            "resumed": losses(resumed.state.log_history),
            "blocks": [isinstance(block, FSDPModule) for block in whole.model.model.layers],  # type: ignore[union-attr]
            "sharded": all(isinstance(value, DTensor) for value in parameters.values()),
            "local A_log": parameters["model.layers.0.gka.A_log"].to_local().numel(),  # type: ignore[attr-defined]
        }
    if whole.is_world_process_zero():
        (place / "seen.json").write_text(json.dumps(seen))
    whole.accelerator.end_training()


if __name__ == "__main__":
    main()
