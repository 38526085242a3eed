"""Check checkpoints: first names, shapes and dtypes from the headers of the files, then the values.

A checkpoint in the published format (`published.py`) is loaded by `from_pretrained` of transformers, between two
checks. The first check reads the headers of the safetensors files, which is fast: all tensors of the configuration
are there and no others, all are floats of one dtype, and no file is truncated. The second check is that all values
are finite.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..nn.decay import REST, UNDECAYED
from .config import GKAConfig
from .folders import begin_folder, end_folder
from .published import MODEL_TYPE
from .published_writer import write_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
WIDE = UNDECAYED  # may be float32 among tensors of 16 bits
LISTED = 20
SHARD_BYTES = 5_000_000_000
_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


class BadCheckpoint(ValueError):
    """A checkpoint that is damaged or contradicts itself; the message lists what is wrong, a line per kind."""


class Header(NamedTuple):
    """The header of a tensor in a file. dtype is written as in safetensors, e.g. "BF16"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _is_wide(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in WIDE


def read_headers(folder: Path) -> dict[str, Header]:
    """The tensors in the safetensors files of a folder: one file, or the files in the index.

    Raises:
        BadCheckpoint: there is no such file, there are only pickle files, or a file is damaged.
    """
    if (folder / SINGLE).is_file():
        return _read_file(folder / SINGLE)
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin*")) + sorted(
            p.name for p in folder.glob("*.pt*")
        )
        if pickles:
            raise BadCheckpoint(
                f"{folder}: its weights are pickle files ({_listed(pickles)}), which can hold code; "
                "use_safetensors=False reads them all the same, tensors only"
            )
        raise BadCheckpoint(f"{folder}: there is neither {SINGLE} nor {INDEX} in it")
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(name) for name in places.values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadCheckpoint(f"{folder / INDEX}: is no index of tensors") from None
    outside = [name for name in files if Path(name).name != name or not name.endswith(".safetensors")]
    if outside:
        raise BadCheckpoint(f"{folder / INDEX}: names what is no safetensors file beside it: {_listed(outside)}")
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise BadCheckpoint(f"{folder}: files that {INDEX} names are not there: {_listed(absent)}")
    found: dict[str, Header] = {}
    for name in files:
        inside = _read_file(folder / name)
        astray = sorted(
            {n for n in inside if places.get(n) != name} | {n for n in places if places[n] == name} - {*inside}
        )
        if astray:
            raise BadCheckpoint(f"{folder / name}: {INDEX} says something else of {_listed(astray)}")
        found |= inside
    return found


def _read_file(path: Path) -> dict[str, Header]:
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            return {n: Header(path, part.get_dtype(), tuple(part.get_shape())) for n, part in parts.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise BadCheckpoint(f"{path}: cannot be read, it is damaged or cut short ({error})") from None


def check_headers(folder: Path, headers: Mapping[str, Header], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the tensors in the files with the tensors of the configuration.

    Raises:
        BadCheckpoint: listing the tensors that are missing, extra, of another shape, or of a wrong dtype.
    """
    common = [name for name in headers if name in expected]
    counts: dict[str, int] = {}
    for name in common:
        if not _is_wide(name):
            counts[headers[name].dtype] = counts.get(headers[name].dtype, 0) + 1
    usual = max(counts, key=lambda dtype: counts[dtype], default="BF16")
    wrong = {
        "missing": sorted(name for name in expected if name not in headers),
        "extra": sorted(name for name in headers if name not in expected),
        "of another shape": [
            f"{name} {list(headers[name].shape)}, expected {list(expected[name])}"
            for name in common
            if headers[name].shape != expected[name]
        ],
        "of another dtype": [
            f"{name} {headers[name].dtype}"
            for name in common
            if headers[name].dtype not in (usual, "F32" if _is_wide(name) else usual)
            or headers[name].dtype not in DTYPES
        ],
    }
    lines = [f"  {kind} ({len(names)}): {_listed(names)}" for kind, names in wrong.items() if names]
    if wrong["of another dtype"]:
        lines[-1] += f"; expected {' or '.join(DTYPES)}, one for all"
    if lines:
        raise BadCheckpoint("\n".join([f"{folder}: its tensors do not fit its config.json", *lines]))


def check_finite(model: nn.Module, source: Any) -> None:
    """Raise BadCheckpoint with a list of the parameters that contain NaN or infinity."""
    bad = [
        name
        for name, value in model.named_parameters()
        if value.is_floating_point() and value.device.type != "meta" and not bool(torch.isfinite(value).all())
    ]
    if bad:
        raise BadCheckpoint(f"{source}: NaN or infinite values in ({len(bad)}): {_listed(bad)}")


def is_published(source: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> bool:
    """Whether a folder, or a repository on the Hugging Face Hub, is in the published format.

    Args:
        source: as `from_pretrained` takes it, with its keywords `kwargs`.
    """
    try:
        found, _ = PreTrainedConfig.get_config_dict(source, **{n: kwargs[n] for n in _HUB if n in kwargs})
    except (OSError, ValueError):
        return False  # transformers says what is wrong
    return isinstance(found, dict) and found.get("model_type") == MODEL_TYPE


def load_published(load: Callable[..., Any], source: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """Load a checkpoint in the published format by `load`, transformers' `from_pretrained`, and check it.

    Args:
        source, args, kwargs: as `from_pretrained` takes them.

    Raises:
        BadCheckpoint: of the files, which are fetched from the Hub if need be, or of what was loaded from them.
        ValueError: the configuration does not fit.
    """
    config = kwargs.get("config")
    if not isinstance(config, GKAConfig):
        config = kwargs["config"] = GKAConfig.from_pretrained(
            source,
            **{name: kwargs[name] for name in _HUB if name in kwargs},
            **{name: kwargs.pop(name) for name in list(kwargs) if name in GKAConfig.__annotations__},
        )
    kwargs.setdefault("use_safetensors", True)
    headers: dict[str, Header] = {}
    if kwargs["use_safetensors"] is not False and kwargs.get("variant") is None:
        folder = _local_folder(source, kwargs)
        try:
            expected = expected_tensors(config)
        except (RuntimeError, OverflowError, MemoryError) as error:
            raise BadCheckpoint(f"{folder}: no model has the sizes of its config.json ({error})") from None
        headers = read_headers(folder)
        check_headers(folder, headers, expected)
        _check_dtype(folder, headers, config, kwargs)
    report_wanted = kwargs.pop("output_loading_info", False)
    kwargs["ignore_mismatched_sizes"] = True  # transformers reports them then, and the next line raises
    model, report = load(source, *args, **kwargs, output_loading_info=True)
    _check_report(source, model, report)
    if kwargs.get("dtype", kwargs.get("torch_dtype")) in (None, "auto"):
        restore_dtypes(model, headers)
    check_finite(model, source)
    return (model, report) if report_wanted else model


def expected_tensors(config: GKAConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a checkpoint of a language model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def _local_folder(source: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Path:
    """The folder itself, or that of the Hub's cache, which gets the repository's weights."""
    folder = Path(source)
    if not folder.is_dir():
        options = {name: kwargs[name] for name in _HUB if name in kwargs and name not in ("subfolder", "proxies")}
        folder = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"], **options))
    return folder / (kwargs.get("subfolder") or "")


def _check_dtype(folder: Path, headers: Mapping[str, Header], config: Any, kwargs: Mapping[str, Any]) -> None:
    """A dtype in config.json by which transformers would convert the tensors, unasked, is a contradiction."""
    stored = {h.dtype for name, h in headers.items() if not _is_wide(name)}
    asked = kwargs.get("dtype", kwargs.get("torch_dtype"))
    if asked not in (None, "auto") or config.dtype is None or not stored:
        return
    if config.dtype != DTYPES[next(iter(stored))]:
        raise BadCheckpoint(
            f"{folder}: its config.json says dtype {config.dtype}, its tensors are {next(iter(stored))}; "
            "from_pretrained(..., dtype=...) says which to load"
        )


def _check_report(source: Any, model: nn.Module, report: Mapping[str, Any]) -> None:
    """What transformers met while loading; a head that another class adds may be new, or left unread."""
    lines = []
    for key, kind in (("missing_keys", "missing"), ("unexpected_keys", "extra"), ("mismatched_keys", "misshapen")):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in report[key])
        names = [name for name in names if name.split(".")[0] not in ("score", "lm_head") or _has_head(model)]
        if names:
            lines.append(f"  {kind} ({len(names)}): {_listed(names)}")
    if lines:
        raise BadCheckpoint("\n".join([f"{source}: its tensors do not fit its config.json", *lines]))


def _has_head(model: nn.Module) -> bool:
    return hasattr(model, "lm_head")


def restore_dtypes(model: nn.Module, headers: Mapping[str, Header]) -> None:
    """Give A_log and dt_bias that are stored in 16 bits that dtype: transformers loads them in float32, always."""
    for name, parameter in model.named_parameters():
        header = headers.get(name, headers.get(f"model.{name}"))
        if header is not None and _is_wide(name) and header.dtype != "F32":
            parameter.data = parameter.data.to(DTYPES[header.dtype])
            layer, _, own_name = name.rpartition(".")
            model.get_submodule(layer).register_buffer(own_name + REST, None)  # 16 bits were all there was


def export_published(
    model: Any, folder: str | os.PathLike[str], *, num_iter: int | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a model in the published format, `hybrid_qwen3` (docs/published.md).

    Args:
        model: a GKAForCausalLM.
        folder: the folder to write; it must be empty or must not exist. It appears only when it is complete.
        num_iter: number of iterations to write; None derives it from the solver steps of the model.
        shard_bytes: maximum size of a weights file in bytes.

    Raises:
        ValueError: the format does not support something in the model.
        FileExistsError: the folder is not empty.
    """
    config = write_config(model.config, num_iter)
    partial = begin_folder(Path(folder))
    write_published(model, partial, config, shard_bytes)
    end_folder(partial, Path(folder))


def write_published(model: Any, folder: Path, config: dict[str, Any], shard_bytes: int) -> None:
    """The files of `export_published`, into an empty folder; config is what `write_config` gives."""
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
