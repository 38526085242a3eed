"""The folder of a training run: create a new one, or open an existing one to resume.

    options.yaml             the options, for `--resume` and `--config`; it marks the folder as a run
    data/                    tokens and held-out text (see data.py)
    checkpoint-N/            the two newest training states, always complete (see trainer.py)
    tensorboard/             curves for TensorBoard
    model/                   the trained model and its tokenizer, for from_pretrained
    trainer_state.json       every logged loss
    loss.png, metrics.json   loss curve and final numbers, with machine, versions and command

Options, tokens, checkpoints, model and metrics are written under a temporary name and then renamed
(gka/hf/folders.py). A run that is killed at any time can be resumed, and no incomplete file looks
complete. An overwritten run is kept as `*.old` until the new run has its tokens.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..hf.folders import partial_of, write_whole
from ..training.data import Manifest, write_tokens
from ..training.errors import UserError, reason
from ..training.trainer import PARTIAL_CHECKPOINT
from .commands import OPTIONS_FILE
from .loading import MODEL_FOLDER
from .options import as_yaml, flag, read_yaml
from .together import together

PARTIAL_MODEL = MODEL_FOLDER + ".partial"

# Options that may change when a run is resumed: its end, its reports, its way to compute, its processes. A
# checkpoint knows how many sequences a step has.
_MAY_CHANGE = frozenset(
    "max_steps max_minutes device gradient_checkpointing loss_chunk compile output resume overwrite log_every "
    "eval_every save_every eval_bytes prompt sample_tokens "
    "batch_size accumulation context_parallel tensor_parallel fsdp".split()
)


def open_run(options: Any, output: Path, tokenizer: Any, sequences_per_step: int) -> None:
    """Create the folder of a new run with options and tokens, or check the folder of a run to resume.

    If a new run cannot start, all files stay as they were.

    Args:
        options: options of `gka train` or of another resumable command that reads data: a dataclass with output,
            resume, overwrite, data, validation_fraction, seq_len and batch_size.
        output: the folder.
        tokenizer: the result of load_tokenizer for options.tokenizer.
        sequences_per_step: sequences of one optimiser step, over all processes.

    Raises:
        UserError: the folder or the data cannot be used; see the messages.
    """
    if options.resume:
        options_file = output / OPTIONS_FILE
        if not options_file.is_file():
            raise UserError(f"--resume: there is no run in {output}; set --output to the folder of the run")
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
                raise UserError(f"--overwrite: {old} exists and is not a run of gka; move it")
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
        else:  # the folder existed and was empty
            (output / OPTIONS_FILE).unlink(missing_ok=True)
            shutil.rmtree(output / "data", ignore_errors=True)
        if overwritten:
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def open_run_together(
    options: Any, output: Path, tokenizer: Any, sequences_per_step: int, arguments: TrainingArguments
) -> Manifest:
    """open_run in the first process, while the others wait; then each reads the manifest.

    Args:
        options, output, tokenizer, sequences_per_step: as for open_run.
        arguments: the arguments of the Trainer, which know the processes.

    Raises:
        UserError: as open_run, in all processes; or a process does not see the files of the first one.
    """

    def open_in_first() -> None:
        if arguments.process_index == 0:
            open_run(options, output, tokenizer, sequences_per_step)

    def read() -> Manifest:
        try:
            return Manifest.load(output / "data")
        except FileNotFoundError:
            raise UserError(
                f"--output {output}: the files of the first process are not there; give a folder that all "
                "machines share"
            ) from None

    together(open_in_first)
    return together(read)


def _fill(options: Any, output: Path, tokenizer: Any, sequences_per_step: int) -> None:
    """Write options and tokens, and check that the text is long enough for one step."""
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
            f"too little text: {manifest.train.tokens:,} training tokens make {sequences} sequences of "
            f"{options.seq_len} tokens, one step needs {sequences_per_step}; add text, or lower --batch-size "
            "or --seq-len"
        )


def _check_place(options: Any, output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; give a folder")
    try:
        held = [path.name for path in output.iterdir()] if output.exists() else []
    except OSError as error:
        raise UserError(f"--output {output}: {reason(error)}") from None
    if OPTIONS_FILE in held:
        if not options.overwrite:
            raise UserError(
                f"--output {output}: already contains a run; resume it with --resume, delete it with --overwrite, "
                "or choose another folder"
            )
    elif set(held) - {partial_of(output / OPTIONS_FILE).name}:
        raise UserError(f"--output {output}: is not empty and is not a run of gka; choose another folder")


def _check_unchanged(options: Any, options_file: Path) -> None:
    saved = dataclasses.asdict(type(options)(**read_yaml(options_file, type(options))))
    for name, value in dataclasses.asdict(options).items():
        if name not in _MAY_CHANGE and value != saved[name]:
            raise UserError(
                f"--resume: the run in {options_file.parent} has {flag(name)} {saved[name]}, "
                f"not {value}; leave out the flag, or start a new run in another folder"
            )
