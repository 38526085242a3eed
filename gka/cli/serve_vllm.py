"""`gka serve --engine vllm`: check the checkpoint, then become the command `vllm serve` with it.

vLLM finds the model by the plugin `gka.vllm`. It cannot decode with the byte tokenizer of `gka train`, which is
written in Python: its engine stops at the first request. It gets the fast byte tokenizer of `gka serve` instead.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from ..training.errors import UserError
from .commands import ServeOptions

# Options that both commands have; gka serve passes them itself.
PASSED = ("--model", "--tokenizer", "--served-model-name", "--host", "--port", "--dtype")


def check_options(options: ServeOptions) -> None:
    """Raise UserError for options without an effect in vLLM, or if vLLM is not installed."""
    if options.device != "auto":
        raise UserError(
            f"--device {options.device}: not with --engine vllm, which uses the device it was built for"
        )
    if options.default_seed is not None:
        raise UserError(
            f"--default-seed {options.default_seed}: not with --engine vllm; its own option is -- --seed N"
        )
    if options.compile:
        raise UserError("--compile: not with --engine vllm, which compiles by itself")
    for word in options.further:
        flag = word.split("=")[0].replace("_", "-")
        if flag in PASSED:
            raise UserError(f"-- {word}: gka serve sets {flag} itself; expected other options of vllm serve")
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:  # a folder of that name is no package
        raise UserError("--engine vllm: needs vLLM, which is not installed: pip install 'gated-kalmanet[vllm]'")


def run_vllm(options: ServeOptions, name: str, model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Replace this process by `vllm serve`.

    Args:
        options: host, port, dtype and further options of the command.
        name: name of the model in requests.
        model: folder of the checkpoint.
        tokenizer: the tokenizer of the checkpoint as a fast tokenizer.
    """
    arguments = vllm_arguments(options, name, model, tokenizer_folder(model, tokenizer))
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments])


def tokenizer_folder(model: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder with a tokenizer for vLLM: that of the checkpoint, or for bytes a new temporary folder."""
    if not isinstance(AutoTokenizer.from_pretrained(model, local_files_only=True), ByT5Tokenizer):
        return model
    folder = Path(tempfile.mkdtemp(prefix="gka-tokenizer-"))
    tokenizer.save_pretrained(folder)
    return folder


def vllm_arguments(options: ServeOptions, name: str, model: Path, tokenizer: Path) -> list[str]:
    """The arguments of the command `vllm`."""
    arguments = ["serve", str(model), "--served-model-name", name, "--tokenizer", str(tokenizer)]
    arguments += ["--host", options.host, "--port", str(options.port), "--dtype", options.dtype]
    return [*arguments, *options.further]
