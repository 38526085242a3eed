"""The text that the language models of the experiments read: files, a tokenizer learnt from them, tokens.

    OUTPUT/corpus-SIZE/
        tokenizer/      byte-level BPE, learnt from the training files (experiments/tasks/bpe.py)
        data/           tokens and the held-out text (gka/training/data.py); of equal files the first alone
        common.npy      bigrams that stand in the training tokens more often than a model need look up
        corpus.json     which files were asked for, and the fingerprint; written last

The fingerprint, of tokens and tokenizer, is part of what a cell is: results of other text are other results. Files
are held out by name; a file that is nearly another, as packages carry copies of packages, may stand in both parts.
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
    encode,
    load_tokenizer,
    validation_texts,
    write_tokens,
)
from gka.training.errors import UserError

from ..tasks.bpe import write_bpe
from ..tasks.recall_loss import RecallLoss, common_bigrams, context_windows, recall_loss

MORE_THAN = 1250  # times in training, Zoology's bound (arXiv 2312.04927)
FRACTION = {"small": 0.2, "full": 0.02}  # of the files, held out
_VOCABULARY = {"small": 512, "full": 8192}
_STANDARD = "(standard library)"


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus.

    Attributes:
        folder: where it lies.
        tokenizer: its <|endoftext|> stands behind every document.
        manifest: files, bytes and tokens of both parts.
        fingerprint: 12 hexadecimal digits.
        arguments: files and folders it was made of.
    """

    folder: Path
    tokenizer: Any
    manifest: Manifest
    fingerprint: str
    arguments: list[str]

    @classmethod
    def load(cls, output: Path, size: str) -> Corpus:
        """That of an output folder, made by `prepare`."""
        folder = _folder(output, size)
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
        """The files and folders as gka.training.data.find_files takes them."""
        return None if self.arguments == [_STANDARD] else self.arguments

    @property
    def common(self) -> np.ndarray:
        """Bigrams that make no recall tokens: uint64 [n], as `recall_loss.common_bigrams` gives them."""
        found: np.ndarray = np.load(self.folder / "common.npy")
        return found

    def describe(self) -> dict[str, Any]:
        """Counts of files, bytes and tokens, for a result."""
        return {name: dataclasses.asdict(getattr(self.manifest, name)) for name in ("train", "validation")}

    def train_blocks(self, seq_len: int, tokens: int) -> TokenBlocks:
        """The first blocks of seq_len training tokens, `tokens` in all or as many as there are."""
        path = self.folder / "data" / "train.bin"
        return TokenBlocks(path, self.manifest.dtype, seq_len, max_blocks=max(1, tokens // seq_len))


def prepare(output: Path, size: str, data: Sequence[str] | None) -> dict[str, str]:
    """Make the corpus if it is not there, and say which it is.

    Args:
        output: folder of all results.
        size: "small" or "full".
        data: files and folders, as `gka train --data` takes them. None means those of the corpus that is there, or
            this Python's standard library, of which the small form takes three packages.

    Returns:
        {"corpus": fingerprint}.

    Raises:
        UserError: the corpus that is there was made of other files, or one cannot be made of these.
    """
    folder = _folder(output, size)
    file = folder / "corpus.json"
    asked = None if data is None else [str(Path(path).expanduser()) for path in data]
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        if asked is not None and asked != known["arguments"]:
            raise UserError(
                f"--data: {folder} was made of {' '.join(known['arguments'])}; "
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
    """Loss on held-out text, the first max_bytes of it, in windows of `context` tokens.

    Args:
        model: a causal language model; it is put into eval mode.
        corpus: whose held-out files are read.
        context: tokens predicted in a window at most.
        max_bytes: of text; 0 takes all.
        batch_size: windows side by side.
        autocast: whether to compute in bfloat16 with weights as they are.
    """
    texts = [text for _, text in validation_texts(corpus.folder / "data", max_bytes)]
    start = document_token(corpus.tokenizer)
    assert start is not None  # load_tokenizer refuses a tokenizer without one
    windows = context_windows([encode(corpus.tokenizer, text) for text in texts], start, context)
    return recall_loss(
        model.eval(),
        windows,
        num_bytes=sum(map(len, texts)),
        batch_size=batch_size,
        common=corpus.common,
        autocast=autocast,
    )


def _folder(output: Path, size: str) -> Path:
    return output / f"corpus-{size}"
