"""A checkpoint of transformers' Trainer made under FSDP2, resumed without it, and the reverse.

Both kinds hold the weights whole, `model.safetensors`, and differ in the rest:

    plain   optimizer.pt: moments numbered in the order of the optimiser's parameters
    FSDP    optimizer.bin: moments by the parameters' names; pytorch_model_fsdp.bin: the weights once more

(FSDP with the Trainer's default state_dict_type, FULL_STATE_DICT.) The Trainer refuses one kind in the other mode.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Trainer

FSDP_WEIGHTS, FSDP_OPTIMIZER = "pytorch_model_fsdp.bin", "optimizer.bin"
PLAIN_WEIGHTS, PLAIN_OPTIMIZER = "model.safetensors", "optimizer.pt"


def fit_checkpoint(trainer: Trainer, checkpoint: str | Path) -> str:
    """The checkpoint in the form that this trainer can resume: itself, or a translated copy beside it.

        trainer.train(resume_from_checkpoint=fit_checkpoint(trainer, "runs/mine/checkpoint-500"))

    Every process calls it. The copy, `plain-checkpoint-500` or `fsdp-checkpoint-500`, appears when it is whole.
    It has no states of random generators, which are per process: dropout draws anew.

    Args:
        trainer: with its model, before `train`.
        checkpoint: a folder checkpoint-N of a Trainer with the same model and weight decay.

    Returns:
        The folder to resume from.

    Raises:
        FileNotFoundError: no such folder, or a file of the checkpoint is missing.
        ValueError: the checkpoint is sharded (`SHARDED_STATE_DICT`), or not of this model.
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
    target = source.with_name(("plain-" if is_fsdp else "fsdp-") + source.name)  # no name that is rotated
    try:
        if trainer.is_world_process_zero():
            _translate(trainer, source, target, to_plain=is_fsdp)
    finally:
        trainer.accelerator.wait_for_everyone()
    if not target.is_dir():  # the first process has said why
        raise ValueError(f"{source}: could not be translated")
    return str(target)


def _translate(trainer: Trainer, source: Path, target: Path, to_plain: bool) -> None:
    partial = target.with_name(target.name + ".partial")
    for folder in (target, partial):
        shutil.rmtree(folder, ignore_errors=True)
    names = _names_in_order(trainer)
    found = torch.load(source / (FSDP_OPTIMIZER if to_plain else PLAIN_OPTIMIZER), weights_only=True)
    by_name = [name for group in names for name in group]
    by_number = list(range(len(by_name)))
    here, there = (by_name, by_number) if to_plain else (by_number, by_name)
    renamed: dict[Any, Any] = dict(zip(here, there, strict=True))
    _check(trainer, source, found, names, here)
    left_out = (FSDP_WEIGHTS, FSDP_OPTIMIZER, PLAIN_OPTIMIZER, "rng_state*")
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns(*left_out))
    state = {new: found["state"][old] for old, new in renamed.items() if old in found["state"]}
    ordered = iter(there)
    groups = [
        {**group, "params": list(islice(ordered, len(own)))}
        for group, own in zip(found["param_groups"], names, strict=True)
    ]
    torch.save(
        {"state": state, "param_groups": groups}, partial / (PLAIN_OPTIMIZER if to_plain else FSDP_OPTIMIZER)
    )
    if not to_plain:
        weights = load_file(source / PLAIN_WEIGHTS)
        for tied, name in (getattr(trainer.model, "all_tied_weights_keys", None) or {}).items():
            weights.setdefault(tied, weights[name])
        torch.save(weights, partial / FSDP_WEIGHTS)
    partial.rename(target)


def _names_in_order(trainer: Trainer) -> list[list[str]]:
    """Names of the optimiser's parameters by group, as the Trainer makes it: with weight decay, without."""
    model: Any = trainer.model
    decayed = set(trainer.get_decay_parameter_names(model))
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    return [[n for n in trained if n in decayed], [n for n in trained if n not in decayed]]


def _check(trainer: Trainer, source: Path, found: Any, names: list[list[str]], keys: Sequence[Any]) -> None:
    """Whether the moments are those of this trainer's parameters, group by group."""
    sizes = [len(group["params"]) for group in found["param_groups"]]
    if sizes != [len(group) for group in names]:
        wanted = [len(group) for group in names]
        raise ValueError(
            f"{source}: its optimiser has groups of {sizes} parameters, this trainer's would of {wanted}"
        )
    shapes = {name: tuple(value.shape) for name, value in trainer.model.named_parameters()}  # type: ignore[union-attr]
    for key, name in zip(keys, (name for group in names for name in group), strict=True):
        moments = found["state"].get(key, {})
        if "exp_avg" in moments and tuple(moments["exp_avg"].shape) != shapes[name]:
            raise ValueError(f"{source}: its optimiser's moments do not have the shape of {name}, {shapes[name]}")
