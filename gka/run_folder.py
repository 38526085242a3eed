"""The folder of a training run: made anew, or found as an earlier process left it.

    options.yaml             the options, for `--resume` and `--config`; it marks the folder as a run
    data/                    tokens and held-out text (see data.py)
    checkpoint-N/            the two newest training states, always whole (see trainer.py)
    tensorboard/             curves for TensorBoard
    model/                   the trained model and its tokenizer, for from_pretrained
    trainer_state.json       every logged loss
    loss.png, metrics.json   the picture and the figures of the end, with machine, versions, command

Whatever is written appears whole: beside its place first (`*.partial`), then renamed. So a run that
is killed at any time leaves something to go on from, and nothing that looks finished and is not.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from .commands import OPTIONS_FILE, TrainOptions
from .data import find_files, write_tokens
from .errors import UserError, reason
from .loading import MODEL_FOLDER
from .options import as_yaml, flag, read_yaml

PARTIAL_CHECKPOINT = "checkpoint.partial"
PARTIAL_MODEL = MODEL_FOLDER + ".partial"

# What may differ from the run that is resumed: where it ends, what it reports, how it computes.
_MAY_CHANGE = frozenset(
    "max_steps max_minutes device gradient_checkpointing compile output resume overwrite log_every "
    "eval_every save_every eval_bytes prompt sample_tokens".split()
)


def open_run(options: TrainOptions, output: Path, tokenizer: Any) -> None:
    """Make the folder of a new run, or check that of a run to resume; then its tokens are there."""
    options_file = output / OPTIONS_FILE
    if options.resume:
        if not options_file.is_file():
            raise UserError(f"--resume: there is no run in {output}; --output names its folder")
        _check_unchanged(options, options_file)
    else:
        _check_place(options, output)
        find_files(options.data)  # what is wrong with --data must show before anything is deleted
        if options_file.is_file():
            shutil.rmtree(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        beside = output / (OPTIONS_FILE + ".partial")
        kept = dataclasses.replace(options, resume=False, overwrite=False)
        beside.write_text(as_yaml(kept), encoding="utf-8")
        beside.replace(options_file)
    except OSError as error:
        raise UserError(f"--output {output}: cannot write there: {reason(error)}") from None
    for leftover in (PARTIAL_CHECKPOINT, PARTIAL_MODEL):
        shutil.rmtree(output / leftover, ignore_errors=True)
    if not (output / "data" / "manifest.json").is_file():
        write_tokens(output / "data", options.data, tokenizer, options.validation_fraction)


def _check_place(options: TrainOptions, output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file, a folder is needed")
    try:
        held = [path.name for path in output.iterdir()] if output.exists() else []
    except OSError as error:
        raise UserError(f"--output {output}: {reason(error)}") from None
    if OPTIONS_FILE in held:
        if not options.overwrite:
            raise UserError(
                f"--output {output}: holds a run already; --resume goes on with it, --overwrite deletes it, "
                "or choose another folder"
            )
    elif set(held) - {OPTIONS_FILE + ".partial"}:
        raise UserError(f"--output {output}: is not empty and no run of gka; choose another folder")


def _check_unchanged(options: TrainOptions, options_file: Path) -> None:
    saved = dataclasses.asdict(TrainOptions(**read_yaml(options_file, TrainOptions)))
    for name, value in dataclasses.asdict(options).items():
        if name not in _MAY_CHANGE and value != saved[name]:
            raise UserError(
                f"--resume: the run in {options_file.parent} has {flag(name)} {saved[name]}, "
                f"not {value}; leave it out, or start a run in another folder"
            )
