"""`gka serve`: serve a model over HTTP with the OpenAI-compatible server of `transformers serve`, or of vLLM.

Routes, requests, streaming and generation are the code of transformers. `transformers serve` alone looks for model
classes in transformers only and cannot find the classes of this library. Therefore it gets a model manager with
one model, loaded with the checks of this library, under a name of the user's choice.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.utils.import_utils import is_serve_available

from ..training.data import open_tokenizer
from ..training.errors import UserError, reason
from .commands import ServeOptions
from .generate import ready_attention
from .loading import compile_steps, find_checkpoint, load_model
from .quiet import quiet
from .serve_errors import answer_errors
from .serve_vllm import check_options, run_vllm


def main(options: ServeOptions) -> None:
    """Run `gka serve` until it is interrupted. Raises UserError for errors that the user can correct."""
    quiet()
    vllm = options.engine == "vllm"
    if vllm:
        check_options(options)
    elif options.further:
        raise UserError(f"-- {' '.join(options.further)}: only with --engine vllm, which these options are for")
    elif not is_serve_available():
        raise UserError("needs the transformers server: pip install 'gated-kalmanet[serve]'")
    path = find_checkpoint(options.checkpoint)
    name = options.name or _default_name(path)
    if not name or any(sign in name for sign in "@:"):
        raise UserError(f"--name {name!r}: must not contain @ or :")
    tokenizer = serving_tokenizer(path)
    _check_port(options.host, options.port)
    model = None if vllm else load_model(options.checkpoint, options.device, options.dtype)
    if model is not None and options.compile:
        with a_thread_for_the_server():  # compiled code is for a number of threads
            _warm_up(model)
    where = "with vLLM" if model is None else f"on {model.device}"
    chat = "" if tokenizer.chat_template else "; no /v1/chat/completions: the tokenizer has no chat template"
    print(f"serving   {name} ({path}) {where}{chat}", file=sys.stderr)
    print(f"address   http://{options.host}:{options.port}/v1", file=sys.stderr, flush=True)
    if vllm:
        run_vllm(options, name, path, tokenizer)
    else:
        run_server(name, model, tokenizer, options.host, options.port, options.default_seed)


def run_server(name: str, model: Any, tokenizer: Any, host: str, port: int, default_seed: int | None) -> None:
    """Serve one model with the code of `transformers serve`, until the process is interrupted.

    Requests run one after another. Each is one call of `generate` with its own cache. Refusals have OpenAI's form.

    Args:
        name: name of the model in requests.
        model: a model in eval mode, on its device.
        tokenizer: a fast tokenizer.
        host, port: address to listen on.
        default_seed: random seed for sampling; None sets no seed.
    """
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager, server

    class OneModel(model_manager.ModelManager):
        """The model manager of transformers, with one fixed model."""

        def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
            return tokenizer

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            return model

        @staticmethod
        def get_gen_models(*args: Any) -> list[dict[str, Any]]:  # type: ignore[override]  # the original is cached
            """The list of `/v1/models`."""
            return [{"id": name, "object": "model", "created": started, "owned_by": "gka"}]

        def shutdown(self) -> None:
            """Keep the model, because the server cannot load it again."""

    def build_server(*args: Any, **kwargs: Any) -> Any:
        app = original(*args, **kwargs)
        answer_errors(app, tokenizer)
        return app

    started, original = int(time.time()), server.build_server
    with (
        ready_attention(),
        a_thread_for_the_server(),
        mock.patch.object(model_manager, "ModelManager", OneModel),
        mock.patch.object(server, "build_server", build_server),
    ):
        Serve(force_model=name, host=host, port=port, log_level="error", default_seed=default_seed)


def _warm_up(model: Any) -> None:
    """Compile the step of a token, so that the first request does not wait."""
    compile_steps(model)
    prompt = torch.zeros((1, 3), dtype=torch.long)
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, min_new_tokens=3, do_sample=False
    )


@contextmanager
def a_thread_for_the_server() -> Iterator[None]:
    """One thread less for PyTorch. With one for each core they wait for the server's own at every operator."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def serving_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a checkpoint. The server needs a fast one (library `tokenizers`) for streaming.

    Raises:
        UserError: there is no tokenizer or it has no vocabulary, or it is not a fast one.
    """
    tokenizer = open_tokenizer(path, str(path))
    if isinstance(tokenizer, ByT5Tokenizer):
        return fast_byte_tokenizer(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{path}: the server needs a fast tokenizer (tokenizer.json)")
    return tokenizer


def fast_byte_tokenizer(tokenizer: ByT5Tokenizer) -> PreTrainedTokenizerFast:
    """The byte tokenizer as a fast tokenizer. A prompt starts a document, as in `gka generate`."""
    special = [tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token]
    vocabulary = {str(token): tokenizer.get_vocab()[str(token)] for token in special}
    vocabulary |= {f"<0x{byte:02X}>": tokenizer.offset + byte for byte in range(256)}
    rust = Tokenizer(models.BPE(vocabulary, [], unk_token=str(tokenizer.unk_token), byte_fallback=True))
    rust.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    end = (str(tokenizer.eos_token), int(tokenizer.eos_token_id))
    rust.post_processor = processors.TemplateProcessing(f"{end[0]} $A", f"{end[0]} $A {end[0]} $B", [end])
    rust.add_special_tokens([AddedToken(str(token), special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        pad_token=tokenizer.pad_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
    )


def _default_name(path: Path) -> str:
    """The name of the checkpoint folder, or of the run folder that contains it."""
    resolved = path.resolve()
    named = resolved.parent if (resolved.parent / "options.yaml").is_file() else resolved
    return named.name.replace("@", "-").replace(":", "-")


def _check_port(host: str, port: int) -> None:
    """Raise UserError if the port is in use; called before the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {reason(error)}") from None
