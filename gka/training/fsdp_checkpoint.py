"""Convert checkpoints of transformers' Trainer between FSDP2 and training without FSDP.

Both kinds contain the full weights, `model.safetensors`, and differ in the other files:

    plain   optimizer.pt: moments by number, in the order of the optimiser's parameters
    FSDP    optimizer.bin: moments by parameter name; pytorch_model_fsdp.bin: the weights again

(FSDP with the Trainer's default state_dict_type, FULL_STATE_DICT.) The Trainer cannot resume one kind in the other
mode. torch.distributed.checkpoint maps names to numbers.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import Trainer

from ..hf.folders import begin_folder, end_folder

FSDP_WEIGHTS, FSDP_OPTIMIZER = "pytorch_model_fsdp.bin", "optimizer.bin"
PLAIN_WEIGHTS, PLAIN_OPTIMIZER = "model.safetensors", "optimizer.pt"


def fit_checkpoint(trainer: Trainer, checkpoint: str | Path) -> str:
    """Return a checkpoint that this trainer can resume: the given one, or a converted copy next to it.

        trainer.train(resume_from_checkpoint=fit_checkpoint(trainer, "runs/mine/checkpoint-500"))

    Every process must call it. The copy, `plain-checkpoint-500` or `fsdp-checkpoint-500`, appears when it is
    complete. It has no states of random generators, because these belong to processes; dropout draws new numbers.

    Args:
        trainer: a trainer with its model, before `train`.
        checkpoint: a folder checkpoint-N of a Trainer with the same model and weight decay.

    Returns:
        The folder to resume from.

    Raises:
        FileNotFoundError: the folder or a file of the checkpoint is missing.
        ValueError: the checkpoint is sharded (`SHARDED_STATE_DICT`), or belongs to another model.
    """
    source = Path(checkpoint)
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such checkpoint folder")
    sharded = [
        path.name for path in source.iterdir() if path.is_dir() and path.name.startswith("pytorch_model_fsdp")
    ]
    if sharded:
        raise ValueError(
            f"{source}: its weights are sharded; fsdp_config's state_dict_type must be FULL_STATE_DICT"
        )
    is_fsdp = (source / FSDP_WEIGHTS).is_file()
    if is_fsdp == bool(trainer.is_fsdp_enabled):
        return str(source)
    target = source.with_name(("plain-" if is_fsdp else "fsdp-") + source.name)  # rotation ignores it
    try:
        if trainer.is_world_process_zero():
            _translate(trainer, source, target, to_plain=is_fsdp)
    finally:
        trainer.accelerator.wait_for_everyone()
    if not target.is_dir():  # the first process reports the reason
        raise ValueError(f"{source}: could not be translated")
    return str(target)


def _translate(trainer: Trainer, source: Path, target: Path, to_plain: bool) -> None:
    found = torch.load(source / (FSDP_OPTIMIZER if to_plain else PLAIN_OPTIMIZER), weights_only=True)
    moments = _other_form(trainer, source, found, to_plain)
    partial = begin_folder(target, overwrite=True)
    left_out = shutil.ignore_patterns(FSDP_WEIGHTS, FSDP_OPTIMIZER, PLAIN_OPTIMIZER, "rng_state*")
    shutil.copytree(source, partial, ignore=left_out, dirs_exist_ok=True)
    torch.save(moments, partial / (PLAIN_OPTIMIZER if to_plain else FSDP_OPTIMIZER))
    if not to_plain:
        weights = load_file(source / PLAIN_WEIGHTS)
        for tied, name in (getattr(trainer.model, "all_tied_weights_keys", None) or {}).items():
            weights.setdefault(tied, weights[name])
        torch.save(weights, partial / FSDP_WEIGHTS)
    end_folder(partial, target)


def _other_form(trainer: Trainer, source: Path, found: dict[str, Any], to_plain: bool) -> dict[str, Any]:
    """Convert the state of the optimiser from names to numbers, or the reverse, with a plain optimiser."""
    model: Any = trainer.model
    held, trainer.optimizer = trainer.optimizer, None
    try:
        optimizer: Any = trainer.create_optimizer()
    finally:
        trainer.optimizer = held
    try:
        if to_plain:
            set_optimizer_state_dict(model, optimizer, found)
        else:
            optimizer.load_state_dict(found)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{source}: its optimiser is not that of this trainer: {error}") from None
    for name, parameter in model.named_parameters():
        shape = optimizer.state.get(parameter, {}).get("exp_avg", parameter).shape
        if shape != parameter.shape:
            raise ValueError(
                f"{source}: its optimiser's moments do not have the shape of {name}, {tuple(parameter.shape)}"
            )
    state: dict[str, Any] = optimizer.state_dict() if to_plain else get_optimizer_state_dict(model, optimizer)
    return state
