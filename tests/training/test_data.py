"""Text files to tokens: which files, which part, which bytes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import write_texts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from gka.training import data
from gka.training.errors import UserError

BYTES = data.load_tokenizer(None)
END = data.document_token(BYTES)


def save_tokenizer(folder: Path, words: list[str], **special: str) -> str:
    """Save a word-level tokenizer with these words and special tokens."""
    vocabulary = {word: index for index, word in enumerate([*words, "<unk>", *special.values()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special).save_pretrained(folder)
    return str(folder)


def documents(folder: Path, part: str, manifest: data.Manifest, end: int) -> list[np.ndarray]:
    """Cut the token file of a part at its end tokens."""
    tokens = np.fromfile(folder / f"{part}.bin", manifest.dtype)
    assert tokens[-1] == end
    return np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1]


def names(arguments: list[str]) -> set[str]:
    return {source.name for source in data.find_files(arguments)[0]}


# Tokens


@given(st.text())
def test_byte_tokens_are_those_of_the_saved_tokenizer(text: str) -> None:
    ids = data.encode(BYTES, text.encode())
    assert ids.tolist() == BYTES(text, add_special_tokens=False)["input_ids"]
    assert BYTES.decode(ids.tolist()) == text


def test_text_that_spells_a_special_token_stays_text() -> None:
    assert END not in data.encode(BYTES, b"a</s><pad>b")


def test_byte_vocabulary_covers_all_bytes_and_special_tokens() -> None:
    assert data.vocabulary_size(BYTES) == len(BYTES) == 259
    assert data.encode(BYTES, bytes(range(128))).max() < 259


@pytest.mark.parametrize(("words", "dtype"), [(5, "uint16"), (70_000, "uint32")])
def test_local_tokenizer_and_the_dtype_it_needs(tmp_path: Path, words: int, dtype: str) -> None:
    vocabulary = [f"w{index}" for index in range(words)]
    folder = save_tokenizer(tmp_path / "tokenizer", vocabulary, eos_token="<end>")
    tokenizer = data.load_tokenizer(folder)
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(4):
        (texts / f"{index}.txt").write_text(f"w{index} w{words - 1}")
    manifest = data.write_tokens(tmp_path / "data", [str(texts)], tokenizer, 0.3)
    end = tokenizer.eos_token_id
    assert manifest.dtype == dtype
    held = documents(tmp_path / "data", "validation", manifest, end)
    all_documents = documents(tmp_path / "data", "train", manifest, end) + held
    assert sorted(part.tolist() for part in all_documents) == [[i, words - 1, end] for i in range(4)]
    assert manifest.tokens_per_byte == sum(map(len, held)) / manifest.validation.bytes


def test_tokenizer_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        data.load_tokenizer(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        data.load_tokenizer(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="end-of-text"):
        data.load_tokenizer(save_tokenizer(tmp_path / "endless", ["a"]))
    Qwen3Config(vocab_size=300).save_pretrained(tmp_path / "model")  # transformers makes an empty tokenizer of it
    with pytest.raises(UserError, match=r"no vocabulary; the folder needs its files, such as tokenizer\.json"):
        data.load_tokenizer(str(tmp_path / "model"))


# Files


def test_a_folder_gives_its_text_files_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a.py", "sub/b.md", "sub/deep/C.TXT", ".hidden.txt", ".git/x.txt", "__pycache__/y.py",
                 "site-packages/z.py", "image.png", "noext"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    assert names([str(tmp_path)]) == {"a.py", "sub/b.md", "sub/deep/C.TXT"}
    assert names([str(tmp_path / "noext")]) == {"noext"}, "a file that is named is taken"


def test_overlapping_arguments_give_each_file_once(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", files=3)
    os.symlink(tmp_path / "texts" / "text0.txt", tmp_path / "link.txt")
    arguments = [str(tmp_path / "texts"), str(tmp_path / "texts" / "text1.txt"), str(tmp_path / "link.txt")]
    assert len(data.find_files(arguments)[0]) == 3


def test_default_text_is_the_standard_library_without_tests() -> None:
    found = {source.name for source in data.find_files(None)[0]}
    assert {"argparse.py", "json/decoder.py"} <= found
    assert not [name for name in found if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert all(name.endswith(".py") for name in found)


def test_missing_and_empty_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        data.find_files([str(tmp_path / "none")])
    with pytest.raises(UserError, match="no text files"):
        data.find_files([str(tmp_path)])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="contains no text"):
        data.write_tokens(tmp_path / "data", [str(tmp_path)], BYTES, 0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_files_that_are_not_utf8(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", files=4)
    (texts / "latin.txt").write_bytes(b"caf\xe9")
    manifest = data.write_tokens(tmp_path / "data", [str(texts)], BYTES, 0.2)
    assert manifest.skipped == "1 not UTF-8 text (e.g. latin.txt)"
    assert manifest.train.files + manifest.validation.files == 4
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 text \(byte 3\)"):
        data.write_tokens(tmp_path / "more", [str(texts), str(texts / "latin.txt")][::-1], BYTES, 0.2)
    assert not (tmp_path / "more").exists()


# The split


@given(st.sets(st.text(min_size=1), min_size=2, max_size=40), st.sets(st.text(min_size=1), max_size=40))
def test_more_files_do_not_reshuffle_the_split(some: set[str], more: set[str]) -> None:
    few, many = data.split_names(sorted(some), 0.3), data.split_names(sorted(some | more), 0.3)
    if few and min(map(data._hash, some)) < 0.3 and max(map(data._hash, some)) >= 0.3:
        assert many & some == few


@given(st.sets(st.text(min_size=1), min_size=2, max_size=60), st.floats(0.01, 0.5))
def test_both_parts_have_files(files: set[str], fraction: float) -> None:
    held_out = data.split_names(sorted(files), fraction)
    assert held_out
    assert held_out < files


def test_the_share_held_out_is_about_what_was_asked_for() -> None:
    held_out = data.split_names([f"file{index}.py" for index in range(4000)], 0.1)
    assert 340 < len(held_out) < 460


@given(st.text(min_size=2), st.floats(0.01, 0.5))
def test_one_file_is_cut_between_characters(text: str, fraction: float) -> None:
    first, second = data._cut(text.encode(), fraction)
    assert first + second == text.encode()
    assert first.decode() + second.decode() == text


def test_one_file_alone_has_its_end_held_out(tmp_path: Path) -> None:
    text = "".join(f"line {index} of the only file\n" for index in range(400))
    (tmp_path / "one.txt").write_text(text)
    manifest = data.write_tokens(tmp_path / "data", [str(tmp_path / "one.txt")], BYTES, 0.1)
    held_out = data.validation_texts(tmp_path / "data")[0][1].decode()
    assert text.endswith(held_out)
    assert held_out.startswith("line ")
    assert 0.09 < manifest.validation.bytes / len(text) < 0.22


# The token files


def test_tokens_are_the_files_byte_for_byte(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    contents = {path.name: path.read_bytes() for path in texts.iterdir()}
    manifest = data.write_tokens(tmp_path / "data", [str(texts)], BYTES, 0.3)
    parts = {}
    for part in ("train", "validation"):
        tokens = documents(tmp_path / "data", part, manifest, END)
        parts[part] = [bytes((document[:-1] - 3).astype(np.uint8)) for document in tokens]
    held_out = data.validation_texts(tmp_path / "data")
    assert parts["validation"] == [text for _, text in held_out] == [contents[name] for name, _ in held_out]
    assert sorted(parts["train"] + parts["validation"]) == sorted(contents.values())
    assert manifest.train.bytes == sum(map(len, parts["train"]))
    assert manifest.train.tokens == manifest.train.bytes + manifest.train.files
    assert data.Manifest.load(tmp_path / "data").validation == manifest.validation
    assert {name for name, _ in held_out} == data.split_names(sorted(contents), 0.3)


def test_the_same_files_give_the_same_tokens_from_another_folder(tmp_path: Path) -> None:
    for place in ("one", "two"):
        texts = write_texts(tmp_path / place / "texts")
        data.write_tokens(tmp_path / place / "data", [str(texts)], BYTES, 0.3)
    for name in ("train.bin", "validation.bin", "validation.raw"):
        one, two = ((tmp_path / place / "data" / name).read_bytes() for place in ("one", "two"))
        assert one == two


@pytest.mark.parametrize("at_once", [1, 500, 10**9])
def test_texts_that_are_encoded_together_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    texts = write_texts(tmp_path / "texts")
    tokenizer = data.load_tokenizer(save_tokenizer(tmp_path / "words", ["the", "of", "state"], eos_token="</s>"))
    monkeypatch.setattr(data, "_AT_ONCE", at_once)
    manifest = data.write_tokens(tmp_path / "data", [str(texts)], tokenizer, 0.3)
    found = documents(tmp_path / "data", "validation", manifest, tokenizer.eos_token_id)
    for document, (_, text) in zip(found, data.validation_texts(tmp_path / "data"), strict=True):
        assert document[:-1].tolist() == data.encode(tokenizer, text).tolist()
    assert manifest.train.files + manifest.validation.files == len(list(texts.iterdir()))


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = write_texts(tmp_path / "texts", files=4)
    calls = iter([0, 0])

    def fail(tokenizer: object, text: bytes) -> np.ndarray:
        next(calls)
        return np.zeros(1, np.uint32)

    monkeypatch.setattr(data, "encode", fail)
    with pytest.raises((StopIteration, RuntimeError)):
        data.write_tokens(tmp_path / "data", [str(texts)], BYTES, 0.3)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


@given(st.lists(st.text(min_size=1), max_size=6), st.integers(0, 40))
def test_a_limit_cuts_between_characters(texts: list[str], limit: int) -> None:
    given_texts = [(str(index), text.encode()) for index, text in enumerate(texts)]
    kept = data.limit_texts(given_texts, limit)
    joined, everything = b"".join(text for _, text in kept), "".join(texts).encode()
    assert everything.startswith(joined)
    for _, text in kept:
        text.decode()
    if limit == 0:
        assert joined == everything
    else:
        assert len(joined) <= limit
        assert all(text for _, text in kept)


def test_blocks_are_consecutive_tokens(tmp_path: Path) -> None:
    tokens = np.arange(107, dtype=np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    blocks = data.TokenBlocks(tmp_path / "tokens.bin", "uint16", 10)
    assert len(blocks) == 10
    assert blocks[3]["input_ids"].tolist() == blocks[3]["labels"].tolist() == list(range(30, 40))
    assert len(data.TokenBlocks(tmp_path / "tokens.bin", "uint16", 10, multiple=4)) == 8
    assert len(data.TokenBlocks(tmp_path / "tokens.bin", "uint16", 10, max_blocks=3)) == 3
    with pytest.raises(IndexError):
        blocks[10]
