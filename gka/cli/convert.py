"""`gka convert`: read a model folder and write the folder of a hybrid model, with the tokenizer files."""

from __future__ import annotations

from pathlib import Path

import torch

from ..hf.convert import FAMILIES, convert
from ..training.errors import UserError
from .convert_options import ConvertOptions
from .loading import find_checkpoint, load_model, write_checkpoint
from .quiet import quiet


def main(options: ConvertOptions) -> None:
    """Run `gka convert`. Raises UserError for errors that the user can correct."""
    quiet()
    if not options.layers:
        raise UserError("--layers: is empty; give the layers to replace, e.g. 1,3,5")
    families = tuple(FAMILIES)
    source, out = find_checkpoint(options.model, families), Path(options.out).expanduser()
    _check_place(out, source, options.overwrite)
    model = load_model(options.model, "cpu", options.dtype, families)
    given = {
        name: getattr(options, name) for name in ("mixer", "solver", "solver_steps", "tolerance", "ridge_ratio")
    }
    torch.manual_seed(options.seed)
    try:
        hybrid = convert(model, options.layers, **{k: value for k, value in given.items() if value is not None})
    except (TypeError, ValueError) as error:
        raise UserError(f"{options.model}: {error}") from None
    copied = write_checkpoint(hybrid, source, out, overwrite=options.overwrite)
    kinds = [hybrid.config.mixer if kind == "linear_attention" else kind for kind in hybrid.config.layer_types]
    missing = f"none in {options.model}; the next commands need one in both folders"
    print(
        f"{out}: {len(options.layers)} of {len(kinds)} layers replaced, {hybrid.num_parameters() / 1e6:.1f} M "
        f"parameters\nlayers     {', '.join(f'{i} {kind}' for i, kind in enumerate(kinds))}\n"
        f"tokenizer  {', '.join(copied) or missing}"
    )
    if copied:
        print(f"next       gka distill {out} --teacher {options.model} --data PATH --output DIR")


def _check_place(out: Path, source: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if out.resolve() == source.resolve():
        raise UserError(f"{out}: is the folder of the model itself; choose another folder")
    if not (out / "config.json").is_file():
        raise UserError(f"{out}: is not empty and contains no model; choose another folder")
    if not overwrite:
        raise UserError(f"{out}: already contains a model; replace it with --overwrite, or choose another folder")
