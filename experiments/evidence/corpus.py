"""The text for the language models of the experiments: files, a tokenizer trained on them, and tokens.

    OUTPUT/corpus-SIZE/     the experiment `large` has its own, SIZE is then large-small or large-full
        tokenizer/      byte-level BPE, trained on the training files (experiments/tasks/bpe.py)
        data/           tokens and the held-out text (gka/training/data.py); only one of several equal files
        common.npy      bigrams that are frequent in the training tokens, so that a model need not recall them
        corpus.json     the requested files and the fingerprint; written last

The fingerprint of tokens and tokenizer is a field of each cell, so that results of different texts stay apart.
Files are held out by name. Two files that are almost equal may be in different parts, e.g. if a package contains a
copy of another package.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gka.hf.folders import write_whole
from gka.training.data import (
    Manifest,
    TokenBlocks,
    document_token,
    encode_all,
    load_tokenizer,
    validation_texts,
    write_tokens,
)
from gka.training.errors import UserError

from ..tasks.bpe import write_bpe
from ..tasks.recall_loss import RecallLoss, common_bigrams, context_windows, recall_loss

MORE_THAN = 1250  # occurrences in training, the bound of Zoology (arXiv 2312.04927)
FRACTION = {"small": 0.2, "full": 0.02, "large-small": 0.2, "large-full": 0.01}  # of the files to hold out
_VOCABULARY = {"small": 512, "full": 8192, "large-small": 512, "large-full": 32_000}
_STANDARD = "(standard library)"


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus.

    Attributes:
        folder: the folder of the corpus.
        tokenizer: the tokenizer; its <|endoftext|> follows every document.
        manifest: files, bytes and tokens of both parts.
        fingerprint: 12 hexadecimal digits.
        arguments: the files and folders of the corpus.
    """

    folder: Path
    tokenizer: Any
    manifest: Manifest
    fingerprint: str
    arguments: list[str]

    @classmethod
    def load(cls, output: Path, size: str) -> Corpus:
        """Load the corpus of an output folder, written by `prepare`."""
        folder = corpus_folder(output, size)
        known = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        return cls(
            folder,
            load_tokenizer(str(folder / "tokenizer")),
            Manifest.load(folder / "data"),
            known["fingerprint"],
            known["arguments"],
        )

    @property
    def data(self) -> list[str] | None:
        """The files and folders, as arguments for gka.training.data.find_files."""
        return None if self.arguments == [_STANDARD] else self.arguments

    @property
    def common(self) -> np.ndarray:
        """Frequent bigrams, which make no recall tokens: uint64 [n], from `recall_loss.common_bigrams`."""
        found: np.ndarray = np.load(self.folder / "common.npy")
        return found

    def describe(self) -> dict[str, Any]:
        """Counts of files, bytes and tokens, for a result."""
        return {name: dataclasses.asdict(getattr(self.manifest, name)) for name in ("train", "validation")}

    def train_blocks(self, seq_len: int, tokens: int) -> TokenBlocks:
        """The first blocks of seq_len training tokens, `tokens` in total or fewer if there are not enough."""
        path = self.folder / "data" / "train.bin"
        return TokenBlocks(path, self.manifest.dtype, seq_len, max_blocks=max(1, tokens // seq_len))


def prepare(output: Path, size: str, data: Sequence[str] | None) -> dict[str, str]:
    """Make the corpus if it does not exist, and return its fingerprint.

    Args:
        output: folder of all results.
        size: "small", "full", "large-small" or "large-full".
        data: files and folders, as for `gka train --data`. None means the files of the existing corpus, or
            Python's standard library if there is none (three of its packages for "small").

    Returns:
        {"corpus": fingerprint}.

    Raises:
        UserError: the existing corpus was made from other files, or no corpus can be made from these files.
    """
    folder = corpus_folder(output, size)
    file = folder / "corpus.json"
    asked = None if data is None else [str(Path(path).expanduser()) for path in data]
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        if asked is not None and asked != known["arguments"]:
            raise UserError(
                f"--data: {folder} was made from {' '.join(known['arguments'])}; "
                "choose another --output for other text"
            )
        return {"corpus": known["fingerprint"]}
    if asked is None and size == "small":
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        asked = [str(stdlib / name) for name in ("asyncio", "email", "json")]
    fraction = FRACTION[size]
    tokenizer_folder, data_folder = folder / "tokenizer", folder / "data"
    tokenizer = write_bpe(tokenizer_folder, asked, fraction=fraction, vocab_size=_VOCABULARY[size], overwrite=True)
    manifest = write_tokens(data_folder, asked, tokenizer, fraction, unique=True)
    train = np.fromfile(data_folder / "train.bin", manifest.dtype)
    np.save(folder / "common.npy", common_bigrams(train, MORE_THAN))
    digest = hashlib.sha256((tokenizer_folder / "tokenizer.json").read_bytes())
    for name in ("train.bin", "validation.bin"):
        digest.update((data_folder / name).read_bytes())
    known = {"fingerprint": digest.hexdigest()[:12], "arguments": asked or [_STANDARD]}
    write_whole(file, json.dumps(known, indent=1) + "\n")
    return {"corpus": known["fingerprint"]}


def evaluate(
    model: Any, corpus: Corpus, *, context: int, max_bytes: int, batch_size: int, autocast: bool
) -> RecallLoss:
    """Loss on the first max_bytes of the held-out text, in windows of `context` tokens.

    Args:
        model: a causal language model; it is set to eval mode.
        corpus: the corpus with the held-out files.
        context: maximum number of predicted tokens in a window.
        max_bytes: bytes of text; 0 means all.
        batch_size: windows per batch.
        autocast: whether to compute in bfloat16; the dtype of the weights stays.
    """
    windows, num_bytes = held_out_windows(corpus, context, max_bytes)
    return recall_loss(
        model.eval(),
        windows,
        num_bytes=num_bytes,
        batch_size=batch_size,
        common=corpus.common,
        autocast=autocast,
    )


def held_out_windows(corpus: Corpus, context: int, max_bytes: int) -> tuple[list[np.ndarray], int]:
    """The windows of `evaluate` [1 + n], n <= context, and the bytes of their text."""
    texts = [text for _, text in validation_texts(corpus.folder / "data", max_bytes)]
    start = document_token(corpus.tokenizer)
    assert start is not None  # load_tokenizer rejects a tokenizer without one
    return context_windows(encode_all(corpus.tokenizer, texts), start, context), sum(map(len, texts))


def corpus_folder(output: Path, size: str) -> Path:
    """The folder of a corpus."""
    return output / f"corpus-{size}"
