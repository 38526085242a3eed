"""Load a model and its tokenizer from a folder, or write them; report failures in one line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompileConfig

from ..hf.checkpoint import BadCheckpoint, check_finite
from ..hf.config import GKAConfig, PublishedConfig
from ..hf.folders import begin_folder, end_folder, replaced
from ..training.data import read_tokenizer, vocabulary_size
from ..training.errors import UserError, first_line, reason
from .machine import check_compiler

MODEL_FOLDER = "model"
_TOKENIZER_FILES = (
    "tokenizer*.json", "tokenizer.model", "spiece.model", "*.tiktoken", "vocab*.json", "vocab.txt", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template*.json", "chat_template*.jinja",
)  # fmt: skip
OURS = (GKAConfig.model_type, PublishedConfig.model_type)


def find_checkpoint(folder: str, families: tuple[str, ...] = OURS) -> Path:
    """The folder of the model: the given folder, or `model/` in the folder of a run.

    Args:
        folder: a checkpoint, or the folder of a run.
        families: the `model_type`s that are accepted.

    Raises:
        UserError: the folder does not exist, contains no model, or contains a model of another type.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        before = replaced(path)
        hint = "" if before is None else f"; its last write was interrupted, the version before is in {before}"
        raise UserError(f"{folder}: no such checkpoint folder{hint}")
    for candidate in (path, path / MODEL_FOLDER):
        config = candidate / "config.json"
        if config.is_file():
            break
    else:
        hint = ""
        if (path / "options.yaml").is_file():
            command = "distill" if "\nteacher:" in (path / "options.yaml").read_text(encoding="utf-8") else "train"
            hint = f"; its training is not complete: `gka {command} --resume --output {folder}` resumes it"
        raise UserError(f"{folder}: is not a checkpoint, it has no config.json{hint}")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except OSError as error:
        raise UserError(f"cannot read {config}: {reason(error)}") from None
    except (ValueError, AttributeError):
        raise UserError(f"{config}: is not a model configuration") from None
    if model_type not in families:
        needed = " or ".join(map(repr, families)) if len(families) < 3 else f"one of {', '.join(families)}"
        from ..hf.convert import FAMILIES  # it takes seconds to import

        hint = "; convert it first with gka convert" if families == OURS and model_type in FAMILIES else ""
        raise UserError(
            f"{folder}: contains a model of type {model_type!r}; this command needs type {needed}{hint}"
        )
    return candidate


def choose_device(name: str) -> torch.device:
    """The device for "auto" or "cpu"."""
    if name == "auto" and torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            return accelerator
    return torch.device("cpu")


def load_model(folder: str, device: str = "auto", dtype: str = "float32", families: tuple[str, ...] = OURS) -> Any:
    """Load a model in eval mode on the device.

    Args:
        folder: a checkpoint, or the folder of a run with a checkpoint in `model/`.
        device: "auto" or "cpu".
        dtype: dtype of the weights, "float32" or "bfloat16"; "auto" keeps the stored dtype.
        families: the `model_type`s that are accepted.

    Raises:
        UserError: as find_checkpoint; or the weights are missing, damaged, not finite, or do not fit.
    """
    path = find_checkpoint(folder, families)
    from ..hf.model import GKAForCausalLM  # after the check: it takes seconds to import

    loader: Any = GKAForCausalLM if families == OURS else AutoModelForCausalLM
    try:
        loaded: Any = loader.from_pretrained(
            path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, report = loaded
        check_finite(model, folder)
    except BadCheckpoint as error:
        raise UserError(str(error).replace(str(path), folder)) from None
    except Exception as error:  # safetensors, json and transformers raise different classes
        raise UserError(f"{folder}: the model cannot be loaded ({first_line(error)})") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            raise UserError(
                f"{folder}: the weights do not fit config.json "
                f"({len(names)} {kind.replace('_', ' ')}, e.g. {names[0]})"
            )
    return model.to(choose_device(device)).eval()


def load_checkpoint(
    folder: str, device: str = "auto", dtype: str = "float32", families: tuple[str, ...] = OURS
) -> tuple[Any, Any]:
    """Load (model, tokenizer); the arguments are those of load_model.

    Raises:
        UserError: as load_model and read_tokenizer, or the tokenizer has more tokens than the model.
    """
    model = load_model(folder, device, dtype, families)
    path = find_checkpoint(folder, families)
    tokenizer = read_tokenizer(path, folder)
    if (size := vocabulary_size(tokenizer)) > model.config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {size} tokens, the model {model.config.vocab_size}")
    return model, tokenizer


def use_solver(model: Any, solver: str | None, solver_steps: list[int] | None, tolerance: float | None) -> None:
    """Set the solver; None keeps what the checkpoint has, and with another solver means its default.

    Raises UserError if the model has no solve, or the arguments do not fit.
    """
    given = {"--solver": solver, "--solver-steps": solver_steps, "--tolerance": tolerance}
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return
    config = model.config
    if solver is None or solver == config.solver:
        solver = config.solver
        solver_steps = config.solver_steps if solver_steps is None else solver_steps
        tolerance = config.tolerance if tolerance is None else tolerance
    try:
        model.set_solver(solver, solver_steps, tolerance)
    except ValueError as error:
        raise UserError(f"{', '.join(names)}: {error}") from None


def compile_steps(model: Any) -> None:
    """Let `generate` of a model on a CPU compile its steps.

    Raises:
        UserError: the model is on a GPU, or there is no C++ compiler.
    """
    if model.device.type != "cpu":
        raise UserError("--compile is for a CPU; on a GPU the steps are replayed from a CUDA graph anyway")
    check_compiler()
    model.generation_config.compile_config = CompileConfig()
    print("compiling the step of a token, 10 to 15 s for each block; less if it is in the cache", file=sys.stderr)


def write_checkpoint(
    model: Any, source: Path, out: Path, *, overwrite: bool, more: Mapping[str, str] | None = None
) -> list[str]:
    """Write the model and its tokenizer to a temporary folder, then rename that folder to `out`.

    Args:
        model: a transformers model.
        source: the folder to copy the tokenizer from; it may have none.
        out: the folder to write.
        overwrite: whether to replace the present content of `out`.
        more: names and texts of further files.

    Returns:
        The names of the tokenizer files.

    Raises:
        UserError: the folder cannot be written.
    """
    partial = None
    try:
        partial = begin_folder(out, overwrite=overwrite)
        model.save_pretrained(partial)
        copied = copy_tokenizer(source, partial)
        for name, text in (more or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        end_folder(partial, out)
    except OSError as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{out}: cannot write there: {reason(error)}") from None
    return copied


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the files of a tokenizer, and no other files, without changes; return their names."""
    found = sorted({path for pattern in _TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()})
    for path in found:
        shutil.copyfile(path, target / path.name)
    return [path.name for path in found]
