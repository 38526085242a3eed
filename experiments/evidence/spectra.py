"""What the solve of a trained model is like: spectra, memory, products to a residual, and the loss of fewer steps.

    part=layers     for each GKA layer: spectrum of S_kk, memory, alpha and beta (spectra_measure.py)
    part=products   the products that conjugate gradient and Chebyshev iteration need on the same inputs
    part=loss       held-out loss of whole windows with a solver; the first such cell is the reference

The model is that of the experiment `lm` with GKA, or that of `--model`. Text: for `lm` the files that it has held
out; with `--model` those of `--data`, else the held-out text of the run of `gka train`. It is joined, with the
end token between files, and cut into windows of equal length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gka.cli.loading import find_checkpoint, load_checkpoint
from gka.training.data import Manifest, document_token, encode_all, find_files, read_texts
from gka.training.errors import UserError

from ..tasks.recall_loss import token_nats
from . import corpus as corpora
from .lm import model_folder
from .record import Cell
from .recorded import INPUTS, recorded
from .spectra_measure import Inputs, memory_at, products_of_layer, spectrum, states_at
from .spectra_page import draw, latest, page_text

SUMMARY = "spectra, memory and solver steps of a trained model"
BY_MACHINE = False
OPTIONS = ("model",)
_TEXT = {
    "small": dict(tokens=256, windows=4, positions=8),
    "full": dict(tokens=32_768, windows=16, positions=32),
}
_INPUT_WINDOWS = 2  # whose inputs are read
_DTYPE = {"small": "float32", "full": "bfloat16"}  # in which the inputs are read
SETTINGS: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("float32", "chebyshev", (31,)),
    ("float32", "chebyshev", (16,)),
    ("float32", "chebyshev", (8,)),
    ("bfloat16", "chebyshev", (31,)),
    ("bfloat16", "chebyshev", (16, 16)),
    ("bfloat16", "chebyshev", (16,)),
    ("bfloat16", "chebyshev", (8,)),
    ("bfloat16", "cg", (10, 10)),
    ("bfloat16", "cg", (10,)),
    ("bfloat16", "cg", (5,)),
)
_QUANTILES = (0.05, 0.5, 0.95)


def cells(size: str) -> list[Cell]:
    """Layers, products, then the losses, the reference first."""
    text = _TEXT[size]
    inputs = {**text, "windows": min(_INPUT_WINDOWS, text["windows"]), "dtype": _DTYPE[size]}
    found: list[Cell] = [{"part": part, **inputs} for part in ("layers", "products")]
    for dtype, solver, steps in SETTINGS:
        loss = {"part": "loss", "dtype": dtype, "solver": solver, "steps": list(steps)}
        found.append({**loss, "tokens": text["tokens"], "windows": text["windows"]})
    return found


def prepare(output: Path, size: str, data: Sequence[str] | None, model: str | None = None) -> dict[str, Any]:
    """The model and its fingerprint, and the text.

    Args:
        output, size: as in corpus.py.
        data: held-out text files for `model`; None means the held-out text of its run.
        model: folder of a checkpoint or of a run; None means the model of the experiment `lm`.

    Raises:
        UserError: there is no such model, it has no GKA layers, or it has no held-out text.
    """
    if model is None:
        text: dict[str, Any] = corpora.prepare(output, size, data)
        folder = model_folder(output, size, "gka")
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder}: there is no model; train it with "
                f"`python -m experiments evidence lm --size {size} --only mixer=gka`, or name one with --model"
            )
    else:
        folder, text = find_checkpoint(model), {"data": None if data is None else list(data)}
        if data is None and not (folder.parent / "data" / "manifest.json").is_file():
            raise UserError(f"--model {model}: has no held-out text; expected text files in --data")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("mixer", "gka") != "gka":
        raise UserError(f"{folder}: its mixer is {config['mixer']}; expected a model with GKA layers")
    return {"model": str(folder) if model is None else model, "weights": _fingerprint(folder), **text}


def _fingerprint(folder: Path) -> str:
    """12 hexadecimal digits of the weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()[:12]


@torch.inference_mode()
def run(cell: Cell, folder: Path, device: torch.device) -> dict[str, Any]:
    """Measure a cell."""
    model, tokenizer = _loaded(cell["model"], cell["weights"], "cpu" if device.type == "cpu" else "auto")
    windows = _windows(cell, folder.parents[1], tokenizer)
    if cell["part"] == "loss":
        return _loss(cell, model, windows)
    calls = [_inputs(model, row, cell["dtype"]) for row in windows]
    ridge, T = model.config.ridge_ratio, cell["tokens"]
    positions = [T * (n + 1) // cell["positions"] - 1 for n in range(cell["positions"])]
    kinds = model.config.layer_types
    found = []
    for number, layer in enumerate(n for n, kind in enumerate(kinds) if kind == "linear_attention"):
        inputs = [call[number] for call in calls]
        if cell["part"] == "layers":
            found.append({"layer": layer, **_layer(inputs, positions, ridge)})
        else:
            found.append({"layer": layer, **_products(inputs, positions, ridge)})
    trained = getattr(model.config, "max_position_embeddings", None)
    return {"layers": found, "D": model.config.head_dim, "trained length": trained, "ridge ratio": ridge}


def section(entries: list[dict[str, Any]], picture: Path) -> str:
    """Answer, tables and picture of the latest model."""
    entries = latest(entries)
    draw(entries, picture)
    return page_text(entries)


@lru_cache(maxsize=1)
def _loaded(folder: str, weights: str, device: str) -> tuple[Any, Any]:
    """The model and its tokenizer, once for all cells; `weights` tells other weights in the same folder apart."""
    return load_checkpoint(folder, device)


def _windows(cell: Cell, output: Path, tokenizer: Any) -> Tensor:
    """Held-out tokens [windows, 1 + tokens], the first of each is given; fewer windows if there is less text."""
    tokens = _held_out(cell, output, tokenizer)
    length = cell["tokens"] + 1
    count = min(cell["windows"], len(tokens) // length)
    if count == 0:
        raise UserError(f"the held-out text has {len(tokens)} tokens; expected at least {length} for one window")
    return torch.from_numpy(tokens[: count * length].astype(np.int64)).view(count, length)


def _held_out(cell: Cell, output: Path, tokenizer: Any) -> np.ndarray:
    """The tokens of all held-out files, with the end token after each."""
    if cell.get("data") is not None:
        return _encoded(tuple(cell["data"]), tokenizer)
    if "corpus" in cell:
        folder = corpora.corpus_folder(output, cell["size"]) / "data"
    else:
        folder = find_checkpoint(cell["model"]).parent / "data"
    return np.fromfile(folder / "validation.bin", Manifest.load(folder).dtype)


@lru_cache(maxsize=1)
def _encoded(data: tuple[str, ...], tokenizer: Any) -> np.ndarray:
    """The tokens of files, once for all cells."""
    sources, skipped = find_files(data)
    texts = [text for _, text in read_texts(sources, skipped)]
    end = np.asarray([document_token(tokenizer)])
    return np.concatenate([part for ids in encode_all(tokenizer, texts) for part in (ids, end)])


def _loss(cell: Cell, model: Any, windows: Tensor) -> dict[str, Any]:
    """Nats and tokens of each window; the model gets its own solver back."""
    own = model.config.solver, model.config.solver_steps, model.config.tolerance
    model.set_solver(cell["solver"], cell["steps"])
    rows = token_nats(model, windows.numpy(), batch_size=1, autocast=cell["dtype"] == "bfloat16")  # type: ignore[arg-type]
    model.set_solver(*own)
    sums = [[float(row.sum(dtype=np.float64)), len(row)] for row in rows]
    return {"windows": sums, "loss": sum(nats for nats, _ in sums) / sum(count for _, count in sums)}


def _inputs(model: Any, row: Tensor, dtype: str) -> list[Inputs]:
    """The inputs of the op in every GKA layer, for one window."""
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    with recorded() as calls, autocast:
        model.base_model(input_ids=row[None, :-1].to(model.device), use_cache=False)
    return [Inputs(*(call[name] for name in INPUTS)) for call in calls]


def _layer(inputs: list[Inputs], positions: list[int], ridge_ratio: float) -> dict[str, Any]:
    """Numbers of one layer; those by head are medians over the positions of all windows."""
    found = [spectrum(states_at(each, positions), ridge_ratio) for each in inputs]
    rank, top, below = (torch.cat([part[name] for part in found]).double() for name in ("rank", "top", "below"))
    memory = torch.cat([memory_at(each.g, positions) for each in inputs]).double()
    result = {
        "below": _rounded(below.mean((0, 1))),
        "memory cut": float((memory > _past(positions, inputs)).double().mean()),
    }
    for name, values in {"rank": rank, "top": top, "memory": memory}.items():
        result[name] = _rounded(values.quantile(0.5, dim=0))
    for name in ("alpha", "beta"):
        gates = [getattr(each, name) for each in inputs]
        if gates[0] is not None:
            points = torch.tensor(_QUANTILES, dtype=torch.float64)
            result[name] = _rounded(torch.cat([gate.flatten() for gate in gates]).double().cpu().quantile(points))
    return result


def _past(positions: list[int], inputs: list[Inputs]) -> Tensor:
    """The number of tokens before each position, for all windows [P, 1]: a longer memory has not ended yet."""
    return torch.tensor(positions * len(inputs), device=inputs[0].g.device).unsqueeze(1)


def _products(inputs: list[Inputs], positions: list[int], ridge_ratio: float) -> dict[str, Any]:
    """Products for each tolerance: [median, 90%, largest] over positions, heads and windows."""
    each = [products_of_layer(one, positions, ridge_ratio) for one in inputs]
    return {
        tolerance: {
            name: _summary([count for found in each for count in found[tolerance][name]])
            for name in ("cg", "chebyshev", "chunks")
        }
        for tolerance in each[0]
    }


def _summary(counts: list[float]) -> list[float]:
    return [float(np.quantile(counts, q)) for q in (0.5, 0.9, 1.0)]


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
