"""The folder of a training run: made anew, or found as an earlier process left it.

    options.yaml             the options, for `--resume` and `--config`; it marks the folder as a run
    data/                    tokens and held-out text (see data.py)
    checkpoint-N/            the two newest training states, always whole (see trainer.py)
    tensorboard/             curves for TensorBoard
    model/                   the trained model and its tokenizer, for from_pretrained
    trainer_state.json       every logged loss
    loss.png, metrics.json   the picture and the figures of the end, with machine, versions, command

Options, tokens, checkpoints, model and metrics appear whole: they are written beside their place
and renamed (gka/hf/folders.py). So a run that is killed at any time leaves something to go on from, and
nothing that looks finished and is not. A run that is overwritten stays beside the new one (`*.old`)
until that has its tokens.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from ..hf.folders import partial_of, write_whole
from ..training.data import Manifest, write_tokens
from ..training.errors import UserError, reason
from ..training.trainer import PARTIAL_CHECKPOINT
from .commands import OPTIONS_FILE
from .loading import MODEL_FOLDER
from .options import as_yaml, flag, read_yaml

PARTIAL_MODEL = MODEL_FOLDER + ".partial"

# What may differ from the run that is resumed: where it ends, what it reports, how it computes.
_MAY_CHANGE = frozenset(
    "max_steps max_minutes device gradient_checkpointing compile output resume overwrite log_every "
    "eval_every save_every eval_bytes prompt sample_tokens".split()
)


def open_run(options: Any, output: Path, tokenizer: Any, sequences_per_step: int) -> None:
    """Make the folder of a new run, or check that of a run to resume; then its options and tokens are there.

    A new run that cannot start leaves everything as it was.

    Args:
        options: of `gka train`, or of another command that reads data and resumes: a dataclass with output,
            resume, overwrite, data, validation_fraction, seq_len and batch_size.
        output: the folder.
        tokenizer: what load_tokenizer gives for options.tokenizer.
        sequences_per_step: of one optimiser step, over all processes.

    Raises:
        UserError: the folder or the data cannot be used; see the messages.
    """
    if options.resume:
        options_file = output / OPTIONS_FILE
        if not options_file.is_file():
            raise UserError(f"--resume: there is no run in {output}; --output names its folder")
        _check_unchanged(options, options_file)
        for leftover in (PARTIAL_CHECKPOINT, PARTIAL_MODEL):
            shutil.rmtree(output / leftover, ignore_errors=True)
        _fill(options, output, tokenizer, sequences_per_step)
        return
    _check_place(options, output)
    old = output.with_name(output.name + ".old")
    overwritten = (output / OPTIONS_FILE).is_file()
    made = not output.exists() or overwritten
    try:
        if overwritten:
            if old.exists() and not (old / OPTIONS_FILE).is_file():
                raise UserError(f"--overwrite: {old} is in the way and no run of gka; move it")
            shutil.rmtree(old, ignore_errors=True)
            output.rename(old)
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot write there: {reason(error)}") from None
    try:
        _fill(options, output, tokenizer, sequences_per_step)
    except BaseException:
        if made:
            shutil.rmtree(output, ignore_errors=True)
        else:  # a folder that was there, and empty
            (output / OPTIONS_FILE).unlink(missing_ok=True)
            shutil.rmtree(output / "data", ignore_errors=True)
        if overwritten:
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _fill(options: Any, output: Path, tokenizer: Any, sequences_per_step: int) -> None:
    """Write options and tokens, and check that the text is enough for a step."""
    try:
        write_whole(output / OPTIONS_FILE, as_yaml(dataclasses.replace(options, resume=False, overwrite=False)))
    except OSError as error:
        raise UserError(f"--output {output}: cannot write there: {reason(error)}") from None
    if (output / "data" / "manifest.json").is_file():
        manifest = Manifest.load(output / "data")
    else:
        manifest = write_tokens(output / "data", options.data, tokenizer, options.validation_fraction)
    sequences = manifest.train.tokens // options.seq_len
    if sequences < sequences_per_step:
        raise UserError(
            f"too little text: {manifest.train.tokens:,} training tokens are {sequences} sequences of "
            f"{options.seq_len}, a step needs {sequences_per_step}; give more text, or lower --batch-size "
            "or --seq-len"
        )


def _check_place(options: Any, output: Path) -> None:
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
    elif set(held) - {partial_of(output / OPTIONS_FILE).name}:
        raise UserError(f"--output {output}: is not empty and no run of gka; choose another folder")


def _check_unchanged(options: Any, options_file: Path) -> None:
    saved = dataclasses.asdict(type(options)(**read_yaml(options_file, type(options))))
    for name, value in dataclasses.asdict(options).items():
        if name not in _MAY_CHANGE and value != saved[name]:
            raise UserError(
                f"--resume: the run in {options_file.parent} has {flag(name)} {saved[name]}, "
                f"not {value}; leave it out, or start a run in another folder"
            )
