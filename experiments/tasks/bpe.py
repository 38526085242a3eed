"""A byte-level BPE tokenizer for a text corpus, learnt from its training files alone.

Byte-pair encoding (arXiv 1508.07909) starts from single symbols and merges the most frequent pair of neighbours,
again and again, until the vocabulary has the wanted size. Byte-level (GPT-2) means that the first symbols are the
256 bytes: there is no unknown token, nothing is normalised, and every text comes back from its tokens as it was.
Merges stay within the words, numbers, runs of signs and runs of spaces that GPT-2's regular expression cuts.

    id 0               <|endoftext|>, the token between documents
    ids 1 .. 256       the bytes, in the order of the characters that stand for them in the file
    ids 257 ..         merges, the most frequent first

Text that spells <|endoftext|> stays text: only `write_tokens` of `gka.training.data` puts the token itself
between documents.

Which files are for training is decided where tokens are written, by `read_parts` of the same module: with the same
files and the same fraction, the files that a run holds out for validation are those that the tokenizer has
never seen.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gka.hf.folders import begin_folder, end_folder
from gka.training.data import Skipped, Source, find_files, read_parts
from gka.training.errors import UserError, reason

END = "<|endoftext|>"
SMALLEST = 256 + 1  # the bytes and the end token
_MIN_COUNT = 2  # a pair that stands there once tells nothing about other texts


def train_bpe(texts: Iterable[str], vocab_size: int = 8192) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE tokenizer; the same texts, in any order, give the same one.

    Args:
        texts: any strings; they are read one after the other and not kept.
        vocab_size: tokens, at least 257. Texts in which no pair of tokens is left that occurs twice give fewer.

    Returns:
        a tokenizer whose end token is <|endoftext|>, and which takes and gives every text without loss.

    Raises:
        UserError: vocab_size is too small.
    """
    if vocab_size < SMALLEST:
        raise UserError(
            f"vocab_size must be at least {SMALLEST}: 256 bytes and the end-of-text token; got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_COUNT,
        show_progress=False,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        clean_up_tokenization_spaces=False,  # it would drop spaces before punctuation
        split_special_tokens=True,  # text that spells the end token is text
    )


def write_bpe(
    folder: str | Path,
    arguments: Sequence[str] | None,
    *,
    fraction: float,
    vocab_size: int = 8192,
    overwrite: bool = False,
) -> PreTrainedTokenizerFast:
    """Learn a tokenizer from the training files of `gka train --data`, and write it for `gka train --tokenizer`.

    The folder appears whole or not at all, and is the same, byte for byte, for the same files.

    Args:
        folder: where to write; it must not hold anything yet, unless overwrite is given.
        arguments: text files and folders as for gka.training.data.find_files; None is the standard library.
        fraction: share of the files that is held out and not read here; that of the run, --validation-fraction.
        vocab_size: as for train_bpe.
        overwrite: whether what the folder holds is replaced.

    Returns:
        the tokenizer; len() of it is the size of its vocabulary.

    Raises:
        UserError: the data cannot be read or leaves no text for training, the vocabulary is too small, or the
            folder holds something or cannot be written.
    """
    folder = Path(folder).expanduser()
    sources, skipped = find_files(arguments)
    partial = None
    try:
        partial = begin_folder(folder, overwrite=overwrite)
        tokenizer = train_bpe(_training_texts(sources, skipped, fraction), vocab_size)
        tokenizer.save_pretrained(partial)
        end_folder(partial, folder)
    except FileExistsError:
        raise UserError(f"{folder}: is not empty; choose another folder") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot write there: {reason(error)}") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return tokenizer


def _training_texts(sources: Sequence[Source], skipped: Skipped, fraction: float) -> Iterator[str]:
    """The texts that are not held out. Raises UserError if there are none."""
    found = False
    for _, text, is_held_out in read_parts(sources, skipped, fraction):
        if text and not is_held_out:
            found = True
            yield text.decode("utf-8")
    if not found:
        left_out = f" (left out: {skipped})" if str(skipped) else ""
        raise UserError(f"too little text in the data, nothing is left for training{left_out}")
