"""`gka eval`: measure bits per byte on text files.

    bits per byte = - sum_i log2 p(token_i | all tokens before it in its file) / bytes of the file

Each file follows an end-of-text token, as each document does in training, and every token of the file
counts. Long files are read window by window. The state of the model is carried from one window to the
next, so the result does not depend on the window length. In GKA layers this state has a constant size;
softmax attention layers keep all keys and values.

Shapes: B files in a batch, W tokens of a window, T tokens of the longest file, X vocabulary.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from ..hf.cache_name import CACHE, named
from ..training.data import document_token, encode, find_files, limit_texts, read_texts, validation_texts
from ..training.errors import UserError
from .commands import EvalOptions
from .loading import find_checkpoint, load_checkpoint, use_solver
from .quiet import quiet


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood of a text in nats, and the text's number of tokens and bytes."""

    name: str
    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bits_per_byte": self.bits_per_byte, "loss_per_token": self.loss}


def side_by_side(
    rows: Sequence[np.ndarray], batch_size: int
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Group token rows of similar length into batches, the longest first, and pad them at the end.

    Args:
        rows: token ids, [T_i] each.
        batch_size: maximum number of rows in a batch, B.

    Yields:
        The indices of the rows, B' <= B; their tokens [B', T] int64, T the length of the longest; and a mask
        [B', T] bool, True for real tokens and False for padding.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        lengths = torch.tensor([len(rows[i]) for i in batch])
        counted = torch.arange(len(rows[batch[0]])) < lengths[:, None]
        tokens = torch.zeros(counted.shape, dtype=torch.long)
        for row, i in enumerate(batch):
            tokens[row, : len(rows[i])] = torch.from_numpy(rows[i].astype(np.int64))
        yield batch, tokens, counted


@torch.inference_mode()
def document_nats(
    model: Any,
    documents: Sequence[np.ndarray],
    start: int,
    *,
    window: int,
    batch_size: int,
    on_tokens: Callable[[int], object] | None = None,
) -> list[float]:
    """Negative log-likelihood of each document in nats, given that the token `start` precedes it.

    Documents of similar length are read in one batch, shorter ones with padding at the end. In a causal
    model this padding cannot influence earlier tokens, and the losses of padding are not counted.

    Args:
        model: a causal language model in eval mode.
        documents: token ids, [T_i] each.
        start: the token before each document.
        window: tokens per forward pass, W.
        batch_size: documents side by side, B.
        on_tokens: called after every forward pass with the number of tokens read in it.
    """
    nats = [0.0] * len(documents)
    for batch, tokens, counted in side_by_side(documents, batch_size):
        longest = tokens.shape[1]
        tokens = torch.cat([torch.full((len(batch), 1), start), tokens], 1)
        cache = None
        for begin in range(0, longest, window):
            end = min(begin + window, longest)
            output = model(
                input_ids=tokens[:, begin:end].to(model.device),
                **named(cache),
                use_cache=True,
            )
            cache = getattr(output, CACHE)
            logits = output.logits.float().flatten(0, 1)  # [B * W, X]
            targets = tokens[:, begin + 1 : end + 1].to(model.device).flatten()
            losses = F.cross_entropy(logits, targets, reduction="none").view(len(batch), -1).double().cpu()
            here = counted[:, begin:end]
            for row, total in zip(batch, (losses * here).sum(1).tolist(), strict=True):
                nats[row] += total
            if on_tokens is not None:
                on_tokens(int(here.sum()))
    return nats


def score_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[tuple[str, bytes]],
    *,
    window: int,
    batch_size: int,
    progress: bool = False,
) -> list[Score]:
    """Score (name, UTF-8 text) pairs; no text may be empty. See document_nats."""
    documents = [encode(tokenizer, text) for _, text in texts]
    start = document_token(tokenizer)
    if start is None:
        raise ValueError("tokenizer must have an eos_token or a bos_token")
    with tqdm(
        total=sum(map(len, documents)),
        desc="evaluating",
        unit=" tokens",
        unit_scale=True,
        leave=False,
        disable=not progress,
    ) as bar:
        nats = document_nats(model, documents, start, window=window, batch_size=batch_size, on_tokens=bar.update)
    return [
        Score(name, total, len(document), len(text))
        for (name, text), total, document in zip(texts, nats, documents, strict=True)
    ]


def total_score(scores: Sequence[Score]) -> Score:
    """The sum over all texts, so that long texts weigh more than short ones."""
    return Score(
        "total",
        math.fsum(score.nats for score in scores),
        sum(score.tokens for score in scores),
        sum(score.bytes for score in scores),
    )


def _texts(options: EvalOptions) -> list[tuple[str, bytes]]:
    if options.data is not None:
        sources, skipped = find_files(options.data)
        texts = limit_texts([(s.name, text) for s, text in read_texts(sources, skipped)], options.max_bytes)
        if not texts:
            left_out = f" (left out: {skipped})" if str(skipped) else ""
            raise UserError(f"--data {' '.join(options.data)}: contains no text{left_out}")
        if str(skipped):
            print(f"left out: {skipped}", file=sys.stderr)
        return texts
    folder = find_checkpoint(options.checkpoint).parent / "data"
    if not (folder / "manifest.json").is_file():
        raise UserError(f"--data is missing: {options.checkpoint} is not in the folder of a training run")
    return validation_texts(folder, options.max_bytes)


def main(options: EvalOptions) -> None:
    """Run `gka eval`. Raises UserError if a text or the checkpoint cannot be read."""
    quiet()
    find_checkpoint(options.checkpoint)
    texts = _texts(options)
    model, tokenizer = load_checkpoint(options.checkpoint, options.device, options.dtype)
    use_solver(model, options.solver, options.solver_steps, options.tolerance)
    scores = score_texts(
        model,
        tokenizer,
        texts,
        window=options.window,
        batch_size=options.batch_size,
        progress=sys.stderr.isatty(),
    )
    total = total_score(scores)
    if options.json:
        report: dict[str, Any] = {"checkpoint": options.checkpoint, "total": total.as_dict()}
        if options.per_file:
            report["files"] = [score.as_dict() for score in scores]
        print(json.dumps(report, indent=2))
        return
    if options.per_file:
        width = max(len(score.name) for score in scores)
        print(f"{'file':<{width}}  {'bytes':>10}  bits/byte")
        for score in sorted(scores, key=lambda score: score.bits_per_byte):
            print(f"{score.name:<{width}}  {score.bytes:>10,}  {score.bits_per_byte:>9.4f}")
    print(
        f"{total.bits_per_byte:.4f} bits per byte, {total.loss:.4f} nats per token "
        f"({len(scores)} files, {total.bytes:,} bytes, {total.tokens:,} tokens)"
    )
