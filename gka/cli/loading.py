"""Load a model and its tokenizer from a folder or write them, or say in one line why that fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..hf.checkpoint import BadCheckpoint, check_finite
from ..hf.config import GKAConfig, PublishedConfig
from ..hf.folders import begin_folder, end_folder, replaced
from ..training.data import document_token
from ..training.errors import UserError, reason

MODEL_FOLDER = "model"
_TOKENIZER_FILES = (
    "tokenizer*.json", "tokenizer.model", "spiece.model", "*.tiktoken", "vocab*.json", "vocab.txt", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template*.json", "chat_template*.jinja",
)  # fmt: skip
OURS = (GKAConfig.model_type, PublishedConfig.model_type)


def find_checkpoint(folder: str, families: tuple[str, ...] = OURS) -> Path:
    """The folder that holds the model: the given one, or `model/` in the folder of a run.

    Args:
        folder: a checkpoint, or the folder of a run.
        families: the `model_type`s that will do.

    Raises:
        UserError: no such folder, no model in it, or a model of another type.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        before = replaced(path)
        hint = "" if before is None else f"; a write of it was interrupted, the one before is whole in {before}"
        raise UserError(f"{folder}: no such checkpoint folder{hint}")
    for candidate in (path, path / MODEL_FOLDER):
        config = candidate / "config.json"
        if config.is_file():
            break
    else:
        hint = ""
        if (path / "options.yaml").is_file():
            command = "distill" if "\nteacher:" in (path / "options.yaml").read_text(encoding="utf-8") else "train"
            hint = f"; its training has not ended: `gka {command} --resume --output {folder}` goes on with it"
        raise UserError(f"{folder}: is no checkpoint, there is no config.json in it{hint}")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except OSError as error:
        raise UserError(f"cannot read {config}: {reason(error)}") from None
    except (ValueError, AttributeError):
        raise UserError(f"{config}: is not the configuration of a model") from None
    if model_type not in families:
        needed = " or ".join(map(repr, families)) if len(families) < 3 else f"one of {', '.join(families)}"
        raise UserError(f"{folder}: holds a model of type {model_type!r}; this command needs type {needed}")
    return candidate


def choose_device(name: str) -> torch.device:
    """The device that "auto" or "cpu" means."""
    if name == "auto" and torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            return accelerator
    return torch.device("cpu")


def load_model(folder: str, device: str = "auto", dtype: str = "float32", families: tuple[str, ...] = OURS) -> Any:
    """Load a model in eval mode on the device.

    Args:
        folder: a checkpoint, or the folder of a run that has one in `model/`.
        device: "auto" or "cpu". dtype: of the weights, "float32" or "bfloat16"; "auto" as they are stored.
        families: the `model_type`s that will do.

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
    except Exception as error:  # safetensors, json and transformers each raise their own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: its model does not load ({first})") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            raise UserError(
                f"{folder}: its weights do not fit its config.json "
                f"({len(names)} {kind.replace('_', ' ')}, e.g. {names[0]})"
            )
    return model.to(choose_device(device)).eval()


def load_checkpoint(
    folder: str, device: str = "auto", dtype: str = "float32", families: tuple[str, ...] = OURS
) -> tuple[Any, Any]:
    """Load (model, tokenizer); as load_model.

    Raises:
        UserError: as load_model; or there is no tokenizer that loads and has an end-of-text token.
    """
    model = load_model(folder, device, dtype, families)
    path = find_checkpoint(folder, families)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: its tokenizer does not load ({first})") from None
    if document_token(tokenizer) is None:
        raise UserError(f"{folder}: its tokenizer has no end-of-text token (eos_token)")
    return model, tokenizer


def use_solver_steps(model: Any, solver_steps: list[int] | None) -> None:
    """Solve with these steps, not the checkpoint's, which None leaves. UserError if the model has no solve."""
    if solver_steps is None:
        return
    try:
        model.set_solver_steps(solver_steps)
    except ValueError as error:
        raise UserError(f"--solver-steps: {error}") from None


def write_checkpoint(
    model: Any, source: Path, out: Path, *, overwrite: bool, more: Mapping[str, str] | None = None
) -> list[str]:
    """Write model and tokenizer beside their place, then put them there; the names of the tokenizer's files.

    Args:
        model: a model of transformers.
        source: a folder with a tokenizer, or with none.
        out: the folder to be.
        overwrite: whether what it holds is replaced.
        more: other files of it, names and texts.

    Raises:
        UserError: it cannot be written there.
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
    """Copy the files of a tokenizer, and only those, as they are; their names."""
    found = sorted({path for pattern in _TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()})
    for path in found:
        shutil.copyfile(path, target / path.name)
    return [path.name for path in found]
