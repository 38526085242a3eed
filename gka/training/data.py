"""From text files to tokens: find the files, hold some out, write the tokens once, read them as blocks.

The folder `data/` of a run:

    train.bin, validation.bin   token ids, uint16 or uint32, each document followed by the end token
    validation.raw              the held-out text, byte for byte
    manifest.json               counts, names and sizes; written last

The folder appears only when it is complete. Whether a file is held out depends only on a hash of its name
relative to the given folder. So more files do not change the split, and no file is in both parts.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import AutoTokenizer, ByT5Tokenizer

from ..hf.folders import begin_folder, end_folder
from .errors import UserError, reason

TEXT_SUFFIXES = frozenset(
    ".adoc .asm .awk .bash .bat .bib .c .cc .cfg .clj .cmake .cpp .cs .css .csv .cu .cuh .cxx .dart .el "
    ".erl .ex .f90 .go .h .hpp .hs .html .ini .ipynb .java .jl .js .json .jsonl .jsx .kt .lisp .log .lua "
    ".m .md .ml .nim .org .php .pl .proto .ps1 .py .pyi .pyx .r .rb .rs .rst .s .scala .scm .sh .sql .srt "
    ".svelte .swift .tcl .tex .toml .ts .tsv .tsx .txt .v .vim .vue .xml .yaml .yml .zig".split()
)
SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_AT_ONCE = 2**24  # bytes of the texts that are encoded together


@dataclass(frozen=True)
class Source:
    """A text file: its path, its name in the split and in reports, and whether the user named it directly."""

    path: Path
    name: str
    named: bool


@dataclass
class Skipped:
    """The files of a folder that were left out, by reason."""

    not_text: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = (("not UTF-8 text", self.not_text), ("not readable", self.unreadable))
        return ", ".join(f"{len(names)} {why} (e.g. {names[0]})" for why, names in kinds if names)


def find_files(arguments: Sequence[str] | None) -> tuple[list[Source], Skipped]:
    """List the text files for `--data`, in an order that does not depend on the machine.

    A file that is named directly can have any suffix. From a folder, all files with a suffix in
    TEXT_SUFFIXES are used, also from subfolders, but not hidden files and folders, SKIPPED_FOLDERS and
    links to folders.

    Args:
        arguments: paths; None for the source files of Python's standard library, without its tests.

    Raises:
        UserError: a path does not exist, or there is no text file.
    """
    skipped = Skipped()
    suffixes, without = TEXT_SUFFIXES, SKIPPED_FOLDERS
    if arguments is None:
        arguments = [sysconfig.get_paths()["stdlib"]]
        suffixes, without = frozenset({".py"}), SKIPPED_FOLDERS | TEST_FOLDERS
    found: dict[str, Source] = {}
    for argument in arguments:
        root = Path(argument).expanduser()
        if root.is_dir():
            sources = list(_walk(root, suffixes, without, skipped))
        elif root.is_file():
            sources = [Source(root, root.name, True)]
        elif root.exists():
            raise UserError(f"--data {argument}: is neither a file nor a folder")
        else:
            raise UserError(f"--data {argument}: no such file or folder")
        for source in sources:
            found.setdefault(os.path.realpath(source.path), source)
    if not found:
        what = f" (left out: {skipped})" if str(skipped) else ""
        raise UserError(f"--data {' '.join(arguments)}: contains no text files{what}")
    return sorted(found.values(), key=lambda source: (_hash(source.name), source.name)), skipped


def _walk(root: Path, suffixes: frozenset[str], without: frozenset[str], skipped: Skipped) -> Iterator[Source]:
    def unreadable(error: OSError) -> None:
        if error.filename == str(root):
            raise UserError(f"--data {root}: {reason(error)}")
        skipped.unreadable.append(str(error.filename))

    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = sorted(name for name in folders if name not in without and not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix.lower() in suffixes and not name.startswith(".") and path.is_file():
                yield Source(path, path.relative_to(root).as_posix(), False)


def _hash(name: str) -> float:
    """A number in [0, 1) that depends only on the name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def read_texts(sources: Sequence[Source], skipped: Skipped) -> Iterator[tuple[Source, bytes]]:
    """Read the files that are not empty and are UTF-8 text, byte for byte.

    Other files are added to `skipped` if they come from a folder.

    Raises:
        UserError: a file that was named directly cannot be read or is not UTF-8.
    """
    for source in sources:
        try:
            text = source.path.read_bytes()
            text.decode("utf-8")
        except OSError as error:
            if source.named:
                raise UserError(f"cannot read {source.path}: {reason(error)}") from None
            skipped.unreadable.append(source.name)
        except UnicodeDecodeError as error:
            if source.named:
                raise UserError(
                    f"{source.path} is not UTF-8 text (byte {error.start}): convert it first"
                ) from None
            skipped.not_text.append(source.name)
        else:
            if text:
                yield source, text


def split_names(names: Sequence[str], fraction: float) -> set[str]:
    """Choose the files to hold out, by the hash of each name.

    If the hashes choose no file, the file with the smallest hash is held out. If they choose all files, the
    one with the largest hash is not. A single file is never held out.
    """
    ordered = sorted(set(names), key=lambda name: (_hash(name), name))
    if len(ordered) < 2:
        return set()
    held_out = [name for name in ordered if _hash(name) < fraction]
    return set(held_out or ordered[:1]) - (set(ordered[-1:]) if len(held_out) == len(ordered) else set())


def read_parts(
    sources: Sequence[Source], skipped: Skipped, fraction: float
) -> Iterator[tuple[Source, bytes, bool]]:
    """Read the texts and tell for each whether it is held out. A single file is cut into two parts.

    Args:
        sources, skipped: from find_files; read_texts adds to skipped.
        fraction: fraction of the files to hold out, see split_names; for a single file, fraction of its bytes.

    Raises:
        UserError: as read_texts.
    """
    held_out = split_names([source.name for source in sources], fraction)
    for source, text in read_texts(sources, skipped):
        if len(sources) > 1:
            yield source, text, source.name in held_out
            continue
        for piece, is_held_out in zip(_cut(text, fraction), (False, True), strict=True):
            yield source, piece, is_held_out


def _cut(text: bytes, fraction: float) -> tuple[bytes, bytes]:
    """Cut one text into training and validation part, between two characters, at a line end if one is near."""
    at = len(text) - max(1, round(len(text) * fraction))
    line_end = text.rfind(b"\n", max(0, at - 1000), at)
    if line_end > 0:
        return text[: line_end + 1], text[line_end + 1 :]
    while at > 0 and text[at] & 0xC0 == 0x80:
        at -= 1
    return text[:at], text[at:]


# Tokens


_NEEDED = "the folder needs its files, such as tokenizer.json"


def load_tokenizer(folder: str | None) -> Any:
    """Load a local Hugging Face tokenizer; None gives the byte tokenizer (ids 3..258, end token 1).

    Raises:
        UserError: the folder does not exist, has no tokenizer, or the tokenizer has no end-of-text token.
    """
    if folder is None:
        return ByT5Tokenizer(extra_ids=0, padding_side="left")  # as generation needs it
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"--tokenizer {folder}: no such folder")
    return read_tokenizer(path, f"--tokenizer {folder}")


def read_tokenizer(path: Path, name: str) -> Any:
    """The tokenizer in a folder, which the errors call `name`, for text in documents.

    Raises:
        UserError: as open_tokenizer, or the tokenizer has no end-of-text token.
    """
    tokenizer = open_tokenizer(path, name)
    if document_token(tokenizer) is None:
        raise UserError(f"{name}: the tokenizer has no end-of-text token (eos_token)")
    return tokenizer


def open_tokenizer(path: Path, name: str) -> Any:
    """Any tokenizer in a folder, which the errors call `name`.

    Raises:
        UserError: the folder has no tokenizer, or one of special tokens alone.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # each kind of tokenizer raises other errors for unreadable files
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: the tokenizer cannot be loaded ({text.rstrip(' .:')}); {_NEEDED}") from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes where the files are missing
        raise UserError(f"{name}: the tokenizer has no vocabulary; {_NEEDED}")
    return tokenizer


def document_token(tokenizer: Any) -> int | None:
    """The id of the token between documents: the end token, which also precedes each document."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id


def vocabulary_size(tokenizer: Any) -> int:
    """The largest token id plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def encode(tokenizer: Any, text: bytes) -> np.ndarray:
    """Token ids of UTF-8 text, [n] uint32, without special tokens.

    With the byte tokenizer each byte is a token, and text that spells a special token stays text.
    """
    if isinstance(tokenizer, ByT5Tokenizer):
        return np.frombuffer(text, np.uint8).astype(np.uint32) + tokenizer.offset
    return encode_all(tokenizer, [text])[0]


def encode_all(tokenizer: Any, texts: Sequence[bytes]) -> list[np.ndarray]:
    """`encode` for several texts, which the tokenizers of Hugging Face encode on all cores."""
    if isinstance(tokenizer, ByT5Tokenizer):
        return [encode(tokenizer, text) for text in texts]
    decoded = [text.decode("utf-8") for text in texts]
    found = tokenizer(decoded, add_special_tokens=False, verbose=False)["input_ids"] if decoded else []
    return [np.asarray(ids, np.uint32) for ids in found]


# The token files of a run


@dataclass
class Part:
    """Counts of the training or the validation part."""

    files: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass
class Manifest:
    """The content of a `data/` folder."""

    dtype: str
    train: Part
    validation: Part
    validation_documents: list[tuple[str, int]]  # names and bytes
    skipped: str

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per byte of held-out text, including end tokens."""
        return self.validation.tokens / self.validation.bytes

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        values = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for part in ("train", "validation"):
            values[part] = Part(**values[part])
        return cls(**values)


def write_tokens(
    folder: Path, arguments: Sequence[str] | None, tokenizer: Any, fraction: float, *, unique: bool = False
) -> Manifest:
    """Tokenise the text files of `--data` into `folder`. The folder appears only when it is complete.

    With `unique`, only the first of several files with equal content is used, in the order of find_files.

    Raises:
        UserError: as find_files and read_texts; or the files contain no text.
    """
    sources, skipped = find_files(arguments)
    building = begin_folder(folder, overwrite=True)
    dtype = "uint16" if vocabulary_size(tokenizer) <= 2**16 else "uint32"
    manifest = Manifest(dtype, Part(), Part(), [], "")
    end = np.asarray([document_token(tokenizer)], dtype)
    seen = set[bytes]()
    try:
        with (
            (building / "train.bin").open("wb") as train,
            (building / "validation.bin").open("wb") as validation,
            (building / "validation.raw").open("wb") as raw,
        ):
            for group in _groups(read_parts(sources, skipped, fraction), _AT_ONCE):
                encoded = encode_all(tokenizer, [text for _, text, _ in group])
                for (source, text, is_held_out), ids in zip(group, encoded, strict=True):
                    if unique:
                        content = hashlib.sha256(text).digest()
                        if content in seen:
                            continue
                        seen.add(content)
                    part, file = (manifest.validation, validation) if is_held_out else (manifest.train, train)
                    ids.astype(dtype).tofile(file)
                    end.tofile(file)
                    part.files += 1
                    part.tokens += len(ids) + 1
                    part.bytes += len(text)
                    if is_held_out:
                        raw.write(text)
                        manifest.validation_documents.append((source.name, len(text)))
        manifest.skipped = str(skipped)
        _check_parts(manifest, arguments)
        (building / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")
        end_folder(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return manifest


def _groups(texts: Iterator[tuple[Source, bytes, bool]], most: int) -> Iterator[list[tuple[Source, bytes, bool]]]:
    """Consecutive texts in groups of up to `most` bytes; a longer text is a group of its own."""
    group, size = list[tuple[Source, bytes, bool]](), 0
    for each in texts:
        if group and size + len(each[1]) > most:
            yield group
            group, size = [], 0
        group.append(each)
        size += len(each[1])
    if group:
        yield group


def _check_parts(manifest: Manifest, arguments: Sequence[str] | None) -> None:
    where = " ".join(arguments or ["(standard library)"])
    left_out = f" (left out: {manifest.skipped})" if manifest.skipped else ""
    if not manifest.train.bytes + manifest.validation.bytes:
        raise UserError(f"--data {where}: contains no text{left_out}")
    for part, files in ((manifest.train, "training"), (manifest.validation, "validation")):
        if not part.bytes:
            raise UserError(f"--data {where}: too little text, nothing is left for {files}{left_out}")


def validation_texts(folder: Path, max_bytes: int = 0) -> list[tuple[str, bytes]]:
    """The held-out documents of a run as (name, text), up to max_bytes (0 = all)."""
    documents, left = [], max_bytes
    with (folder / "validation.raw").open("rb") as raw:
        for name, size in Manifest.load(folder).validation_documents:
            text = raw.read(size)
            documents.append((name, text))
            left -= size
            if max_bytes and left <= 0:
                break
    return limit_texts(documents, max_bytes)


def limit_texts(documents: Sequence[tuple[str, bytes]], max_bytes: int) -> list[tuple[str, bytes]]:
    """Cut a list of (name, text) after max_bytes (0 = never), between two characters."""
    if not max_bytes:
        return list(documents)
    kept, left = [], max_bytes
    for name, text in documents:
        piece = text[:left].decode("utf-8", "ignore").encode("utf-8") if len(text) > left else text
        if piece:
            kept.append((name, piece))
        left -= len(text)
        if left <= 0:
            break
    return kept


class TokenBlocks(Dataset[dict[str, torch.Tensor]]):
    """Blocks of seq_len consecutive tokens of a memory-mapped token file, as inputs and labels.

    Args:
        path: the token file.
        dtype: numpy dtype of the file.
        seq_len: tokens per block.
        multiple: the number of blocks is rounded down to a multiple of it, so that all batches are full.
        max_blocks: maximum number of blocks; 0 means all.

    Items are {"input_ids": [seq_len] int64, "labels": the same}; the model shifts the labels.
    """

    def __init__(self, path: Path, dtype: str, seq_len: int, multiple: int = 1, max_blocks: int = 0) -> None:
        self.tokens = np.memmap(path, dtype, mode="r")
        self.seq_len = seq_len
        blocks = len(self.tokens) // seq_len
        if max_blocks:
            blocks = min(blocks, max_blocks)
        self.blocks = blocks // multiple * multiple

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.blocks:
            raise IndexError(f"block {index} of {self.blocks}")
        block = self.tokens[index * self.seq_len : (index + 1) * self.seq_len]
        ids = torch.from_numpy(block.astype(np.int64))
        return {"input_ids": ids, "labels": ids}
