"""A byte-level BPE tokenizer loses nothing and sees no held-out file (experiments/tasks/bpe.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_run import run_process, train, write_texts
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from experiments.tasks import bpe
from experiments.tasks.bpe import END, SMALLEST, train_bpe, write_bpe
from gka.cli.loading import load_checkpoint
from gka.training import data
from gka.training.errors import UserError

CORPUS = [
    "the state of the ridge\n" * 20,
    "    def solve(key, value):\n        return key\n" * 20,
    "überall λ 👍 " * 20,
]
SMALL = train_bpe(CORPUS, 320)


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def words_of(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """What the tokens stand for, as far as that is text."""
    return {tokenizer.decode([index]) for index in range(SMALLEST, len(tokenizer))}


@given(st.text())
@example("")
@example(f"a{END}b {END}")
@example("\r\n \t\x00\u00a0\u2028 don't  .  ,  !\ufeff")
@example("e\u0301 \u00e9 \ufb01 \U0001f468\u200d\U0001f469 \ud7ff\U0010ffff")
def test_every_text_comes_back_from_its_tokens(text: str) -> None:
    ids = data.encode(SMALL, text.encode())
    assert SMALL.decode(ids.tolist()) == text
    assert SMALL.decode(ids.tolist(), skip_special_tokens=True) == text
    assert data.document_token(SMALL) not in ids


@pytest.mark.parametrize("vocab_size", [SMALLEST, 320, 400])
def test_the_vocabulary_is_the_end_the_bytes_and_merges(vocab_size: int) -> None:
    text = " ".join(f"word{number * number}" for number in range(3000))
    tokenizer = train_bpe([text], vocab_size)
    assert len(tokenizer) == data.vocabulary_size(tokenizer) == vocab_size
    assert tokenizer.convert_ids_to_tokens(0) == tokenizer.eos_token == END
    assert data.document_token(tokenizer) == 0
    singles = {tokenizer.convert_ids_to_tokens(index) for index in range(1, SMALLEST)}
    assert len(singles) == 256 and all(len(single) == 1 for single in singles)
    if vocab_size == SMALLEST:
        ids = data.encode(tokenizer, text.encode())
        assert len(ids) == len(text)


def test_frequent_pairs_are_merged_and_rare_ones_are_not() -> None:
    tokenizer = train_bpe(["gain gain gain gain ridge"], 8192)
    assert {"ai", "gain", " gain"} & words_of(tokenizer)
    assert not {"ri", "id", "dg", "ge", "ridge"} & words_of(tokenizer)
    assert len(data.encode(tokenizer, b" gain gain")) == 2
    assert len(tokenizer) < 8192, "pairs that stand there once are not learnt"


def test_the_order_of_the_texts_does_not_matter() -> None:
    first, second = train_bpe(CORPUS, 320), train_bpe(CORPUS[::-1], 320)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


@pytest.mark.parametrize("vocab_size", [0, SMALLEST - 1])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(vocab_size: int) -> None:
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(CORPUS, vocab_size)


def test_it_is_the_same_folder_in_every_process(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    write_bpe(tmp_path / "here", [str(texts)], fraction=0.2, vocab_size=400)
    code = (
        "from experiments.tasks.bpe import write_bpe; "
        f"write_bpe({str(tmp_path / 'there')!r}, [{str(texts)!r}], fraction=0.2, vocab_size=400)"
    )
    run_process(launcher=("-c", code), env={"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3"})
    assert written(tmp_path / "here") == written(tmp_path / "there")
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(written(tmp_path / "here"))


def test_the_folder_loads_as_the_tokenizer_that_was_learnt(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    learnt = write_bpe(tmp_path / "bpe", [str(texts)], fraction=0.2, vocab_size=400)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path / "bpe"), data.load_tokenizer(str(tmp_path / "bpe"))):
        assert isinstance(loaded, PreTrainedTokenizerFast)
        assert loaded.get_vocab() == learnt.get_vocab()
        assert data.document_token(loaded) == loaded.convert_tokens_to_ids(END)
        for text in (*CORPUS, f"x{END} , y ."):
            ids = data.encode(loaded, text.encode())
            assert ids.tolist() == data.encode(learnt, text.encode()).tolist()
            assert loaded.decode(ids.tolist()) == text


def corpus_with_marks(folder: Path, files: int = 30) -> tuple[set[str], set[str]]:
    """Files with a word of their own each; the words of those that are trained on, and of those held out."""
    write_texts(folder, files)
    names = [f"text{index}.txt" for index in range(files)]
    marks = {name: f"Zq{chr(97 + index // 26)}{chr(97 + index % 26)}x" for index, name in enumerate(names)}
    for name in names:
        path = folder / name
        path.write_text(path.read_text(encoding="utf-8") + f" {marks[name]}" * 40, encoding="utf-8")
    held_out = data.split_names(names, 0.3)
    return {marks[name] for name in names if name not in held_out}, {marks[name] for name in held_out}


def test_held_out_files_are_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, held_out = corpus_with_marks(tmp_path / "texts")
    assert trained and held_out
    seen: list[str] = []

    def spy(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
        seen.extend(texts)
        return train_bpe(seen, vocab_size)

    monkeypatch.setattr(bpe, "train_bpe", spy)
    tokenizer = write_bpe(tmp_path / "bpe", [str(tmp_path / "texts")], fraction=0.3, vocab_size=4000)
    learnt = {word.strip() for word in words_of(tokenizer)}
    assert trained <= learnt and not held_out & learnt

    # what a run of the same fraction trains on is what was read, and what it holds out was not
    manifest = data.write_tokens(tmp_path / "data", [str(tmp_path / "texts")], tokenizer, 0.3)
    tokens = np.fromfile(tmp_path / "data" / "train.bin", manifest.dtype)
    assert tokenizer.decode(tokens.tolist()) == "".join(text + END for text in seen)
    assert not set(seen) & {text.decode() for _, text in data.validation_texts(tmp_path / "data")}


def test_the_held_out_end_of_a_single_file_is_never_seen(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("gain ridge\n" * 300 + "Zqx\n" * 300)
    tokenizer = write_bpe(tmp_path / "bpe", [str(path)], fraction=0.5, vocab_size=400)
    assert " ridge" in words_of(tokenizer) and not any("Z" in word for word in words_of(tokenizer))


def test_a_run_trains_with_it_and_its_model_holds_it(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    learnt = write_bpe(tmp_path / "bpe", [str(texts)], fraction=0.2, vocab_size=300)
    assert train(tmp_path / "run", texts, tokenizer=tmp_path / "bpe", max_steps=4, eval_every=4) == 0
    model, tokenizer = load_checkpoint(str(tmp_path / "run"), "cpu")
    assert model.config.vocab_size == len(tokenizer) == 300
    assert tokenizer.get_vocab() == learnt.get_vocab()
    score = json.loads((tmp_path / "run" / "metrics.json").read_text())["validation"]
    assert score["tokens"] < score["bytes"], "merges make texts shorter"


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = write_texts(tmp_path / "texts")
    place = tmp_path / "place"
    for fail, message in (
        (lambda: write_bpe(place / "bpe", [str(texts)], fraction=0.2, vocab_size=10), "at least 257"),
        (lambda: write_bpe(place / "bpe", [str(tmp_path / "none")], fraction=0.2), "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            fail()
        assert not place.exists() or not list(place.iterdir())
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(UserError, match="nothing is left for training"):
        write_bpe(place / "bpe", [str(tmp_path / "short.txt")], fraction=0.5)
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", _full_disk)
    with pytest.raises(UserError, match="no space left"):
        write_bpe(place / "bpe", [str(texts)], fraction=0.2, vocab_size=300)
    assert not list(place.iterdir())


def _full_disk(self: PreTrainedTokenizerFast, folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    raise OSError(28, "No space left on device")


def test_a_folder_is_replaced_only_when_told(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    write_bpe(tmp_path / "bpe", [str(texts)], fraction=0.2, vocab_size=300)
    before = written(tmp_path / "bpe")
    with pytest.raises(UserError, match="not empty"):
        write_bpe(tmp_path / "bpe", [str(texts)], fraction=0.2, vocab_size=305)
    assert written(tmp_path / "bpe") == before
    write_bpe(tmp_path / "bpe", [str(texts)], fraction=0.2, vocab_size=305, overwrite=True)
    assert len(data.load_tokenizer(str(tmp_path / "bpe"))) == 305
