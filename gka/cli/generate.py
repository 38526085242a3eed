"""`gka generate`: continue a prompt and print the text token by token."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import torch
from transformers import TextStreamer

from ..training.data import document_token, encode
from ..training.errors import UserError
from .commands import GenerateOptions
from .loading import compile_steps, load_checkpoint, use_solver
from .quiet import quiet


class _Stream(TextStreamer):
    """Writes the text to a file object, whole words at a time."""

    def __init__(self, tokenizer: Any, file: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.file = file

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.file.write(text)
        self.file.flush()


@contextmanager
def ready_attention() -> Iterator[None]:
    """Disable cuDNN attention in the whole process while the context is open.

    On a Hopper GPU, PyTorch prefers cuDNN attention. cuDNN makes a new plan for every new length, and in decoding
    every step has a new length. On an H100 a step of one block took 45 ms with cuDNN and 2 ms without
    (docs/kernels.md).
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = None,
    file: TextIO | None = None,
) -> str:
    """Continue a prompt. The model reads the prompt as the start of a document.

    Args:
        model, tokenizer: from load_checkpoint.
        prompt: text; "" starts a document.
        max_new_tokens: maximum number of new tokens; the text is shorter if the model ends the document.
        temperature: sampling temperature; 0 picks the likeliest token every time.
        top_p: probability mass for nucleus sampling, in (0, 1].
        seed: random seed, the same seed gives the same text; None leaves the random generators unchanged.
        file: the prompt and the text are written to it during generation.

    Returns:
        The generated text, without the prompt.
    """
    if seed is not None:
        torch.manual_seed(seed)
    start = document_token(tokenizer)
    ids = [start, *encode(tokenizer, prompt.encode("utf-8")).tolist()]
    inputs = torch.tensor([ids], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    if file is not None:
        file.write(prompt)
        file.flush()
    with torch.inference_mode(), ready_attention():
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else start,
            streamer=_Stream(tokenizer, file) if file is not None else None,
            **sampling,
        )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def main(options: GenerateOptions) -> None:
    """Run `gka generate`. Raises UserError if the prompt or the checkpoint cannot be read."""
    quiet()
    prompt = options.prompt
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"the prompt on standard input is not UTF-8 text (byte {error.start})") from None
        prompt = prompt.removesuffix("\n")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("--prompt is not UTF-8 text") from None
    model, tokenizer = load_checkpoint(options.checkpoint, options.device, options.dtype)
    use_solver(model, options.solver, options.solver_steps, options.tolerance)
    if options.compile:
        compile_steps(model)
    generate(
        model,
        tokenizer,
        prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        file=sys.stdout,
    )
    print()
