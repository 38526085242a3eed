"""The experiment `long`: what is trained on and asked is as promised, scores are right, a cut run goes on."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pages import assert_drawn, rows_of

from experiments import __main__ as command_line
from experiments.evidence import long, questions
from experiments.evidence.corpus import Corpus
from experiments.evidence.lm import ALL, language_model, model_folder
from experiments.evidence.page import write_page
from experiments.evidence.questions import IGNORE, PLANS, TEXT_EVERY, Plan, Questions
from experiments.evidence.record import Record
from gka import GKAForCausalLM
from gka.hf.cache_name import named

NEEDLE = re.compile(r"A secret number of (\S+) is (\d{7})\.\s")
ASKED = re.compile(r"What is the secret number of (\S+)\?\nThe secret number of (\S+) in the text is$")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus and questions of the small form, and untrained models in the place of those of `lm`."""
    folder = tmp_path_factory.mktemp("evidence")
    long.prepare(folder, "small", None)
    corpus = Corpus.load(folder, "small")
    for mixer in ALL:
        torch.manual_seed(0)
        config = language_model(mixer, "small", len(corpus.tokenizer), corpus.tokenizer.eos_token_id)
        place = model_folder(folder, "small", mixer)
        GKAForCausalLM(config).save_pretrained(place)
        corpus.tokenizer.save_pretrained(place)
    return folder


def examples_in(output: Path) -> list[tuple[str, str, list[str]]]:
    """The examples of the training rows: prompt with answer, what of it is counted, the same token by token."""
    tokenizer = Corpus.load(output, "small").tokenizer
    found = []
    for row in Questions.load(output, "small").rows():  # type: ignore[attr-defined]
        ids, labels = row["input_ids"], row["labels"]
        starts = [-1, *(ids == tokenizer.eos_token_id).nonzero().flatten().tolist(), len(ids)]
        for start, end in itertools.pairwise(starts):
            whole = tokenizer.decode(ids[start + 1 : end])
            if whole.startswith(("Secret numbers are hidden", "Here is a document made of files")):
                counted = labels[start + 1 : end] != IGNORE
                last = int((~counted).nonzero().max()) + 1  # all behind it is counted
                before = tokenizer.decode(ids[start + 1 : start + 1 + last])
                found.append((before, tokenizer.decode(ids[start + 1 + last : end]), counted[:last].tolist()))
    return found


def test_answers_are_counted_and_prompts_are_not(output: Path) -> None:
    found = examples_in(output)
    index = Questions.load(output, "small").index
    assert len(found) == sum(index["examples"].values()) == 6
    for prompt, answer, counted in found:
        assert not any(counted) and answer.startswith(" ") and answer.endswith("\n")
        asked = ASKED.search(prompt)
        if asked:
            assert dict(NEEDLE.findall(prompt))[asked[1]] == answer.strip() and asked[1] == asked[2]
        else:
            assert prompt.endswith("?\nAnswer:") and answer.strip() in prompt
    assert any(ASKED.search(prompt) for prompt, *_ in found)


def test_half_of_the_rows_are_text_of_which_a_share_is_counted(output: Path) -> None:
    rows = Questions.load(output, "small").rows()
    assert len(rows) == 8
    train = Corpus.load(output, "small").train_blocks(1, 10**9).tokens
    for row in list(rows)[4:]:  # type: ignore[call-overload]
        ids, labels = row["input_ids"], row["labels"]
        assert ids.shape == (1024,) and ids.numpy().astype(train.dtype).tobytes() in train.tobytes()
        counted = labels != IGNORE
        assert (labels[counted] == ids[counted]).all()
        assert 0.5 < counted.float().mean() * TEXT_EVERY < 1.5


def test_windows_end_in_a_question_that_no_training_has_the_answer_of(output: Path) -> None:
    corpus = Corpus.load(output, "small")
    held_out = {name for name, _ in corpus.manifest.validation_documents}
    trained = "".join(corpus.tokenizer.decode(row["input_ids"]) for row in Questions.load(output, "small").rows())  # type: ignore[attr-defined]
    for length in (512, 1024):
        for task in ("niah_single_1", "long_qa"):
            tests = Questions.load(output, "small").tests(task, length)
            assert tests.windows.shape[0] == len(tests.answers) == 2
            assert 0.85 * length < tests.windows.shape[1] <= length
            for window, (answer,) in zip(tests.windows, tests.answers, strict=True):
                text = corpus.tokenizer.decode(
                    window[(window == corpus.tokenizer.eos_token_id).nonzero().max() + 1 :]
                )
                if task == "long_qa":
                    (question,) = re.findall(r"\nQuestion: (.*)\nAnswer:$", text)
                    assert answer in text and question not in trained
                    assert set(re.findall(r"^# File: ([^,\n]+)", text, re.M)) <= held_out
                else:
                    asked = ASKED.search(text)
                    assert asked and dict(NEEDLE.findall(text)) == {asked[1]: answer}
                    assert answer not in trained and asked[1] not in trained
    asked_of = set(re.findall(r"\n# File: ([^,\n]+)", "".join(prompt for prompt, *_ in examples_in(output))))
    assert asked_of and not asked_of & held_out


def test_the_full_plan_fills_half_of_its_rows_with_examples_of_every_task() -> None:
    plan = PLANS["full"]
    jobs = questions._jobs(plan)
    assert sum(count for _, count in plan.trained) == plan.rows // 2
    sizes = [job.length for job in jobs if job.split == "train" for _ in range(job.count)]
    rows = questions._shared_out(sizes, plan)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) == plan.row for row in rows)
    counts = {
        task: sum(job.count for job in jobs if (job.task, job.split) == (task, "train")) for task in plan.tasks
    }
    assert max(counts.values()) - min(counts.values()) <= len(plan.trained) and min(counts.values()) > 100
    tests = [(job.task, job.length, job.count) for job in jobs if job.split == "test"]
    assert sorted(tests) == sorted((task, T, n) for T, n in plan.tested for task in plan.tasks)


def test_it_is_made_once_for_a_plan(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (output / "questions-small" / "index.json").read_bytes()
    assert long.prepare(output, "small", None).keys() == {"corpus"}
    assert capsys.readouterr().err == ""
    fewer = Plan(1024, 4, ((1024, 2),), ((512, 1),), ("niah_single_1",), 200, in_parallel=False)
    with monkeypatch.context() as patched:
        patched.setitem(PLANS, "small", fewer)
        long.prepare(output, "small", None)
        assert len(Questions.load(output, "small").rows()) == 4
    long.prepare(output, "small", None)
    assert (output / "questions-small" / "index.json").read_bytes() == before


class Copier:
    """Goes on with the number that stands behind the key that is asked for, and then with another line."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: Any, right: bool) -> None:
        self.tokenizer, self.right = tokenizer, right
        self.read: list[tuple[int, ...]] = []

    def __call__(
        self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool, logits_to_keep: int
    ) -> SimpleNamespace:
        self.read.append(tuple(input_ids.shape))
        cache = past_key_values or [self.line(window) for window in input_ids]
        logits = torch.zeros(len(cache), logits_to_keep, len(self.tokenizer))
        for row, tokens in enumerate(cache):
            logits[row, -1, tokens.pop(0)] = 1.0
        return SimpleNamespace(logits=logits, **named(cache if use_cache else None))

    def line(self, window: torch.Tensor) -> list[int]:
        text = self.tokenizer.decode(window)
        asked = ASKED.search(text)
        assert asked is not None
        number = dict(NEEDLE.findall(text))[asked[1]] if self.right else "1234567"
        tokens: list[int] = self.tokenizer.encode(f" {number}.\nand so on and on and on")
        return tokens


@pytest.mark.parametrize("right", [True, False])
def test_a_model_that_copies_is_right(output: Path, monkeypatch: pytest.MonkeyPatch, right: bool) -> None:
    monkeypatch.setattr(long, "_AT_ONCE", 600)
    tokenizer = Corpus.load(output, "small").tokenizer
    tests = Questions.load(output, "small").tests("niah_single_1", 512)
    model = Copier(tokenizer, right)
    (line_end,) = tokenizer.encode("\n")
    texts = long.answer(model, tokenizer, tests.windows, tests.longest + 8, [line_end], autocast=False)
    found = long.scored("niah_single_1", texts, tests.answers)
    assert found["score"] == float(right) and found["each"] == [float(right)] * 2
    assert all(re.fullmatch(r" \d{7}\.", text) for text in texts)
    steps = [len(tokenizer.encode(text + "\n")) - 1 for text in texts]  # row by row, and no further than the line
    T = tests.windows.shape[1]
    assert model.read == [(1, T), *[(1, 1)] * steps[0], (1, T), *[(1, 1)] * steps[1]]


def test_scores_are_those_of_the_tasks() -> None:
    found = long.scored("niah_multiquery", [" 1111111, 2222222", " 1111111"], [["1111111", "2222222"]] * 2)
    assert found["each"] == [1.0, 0.5] and found["score"] == 0.75 and "exact match" not in found
    found = long.scored("rag", [" a/b.py", " a/b.py c", ""], [["a/b.py"], ["a/b.py"], ["7"]])
    assert found["each"] == [1.0, round(6 / 7, 4), 0.0] and found["exact match"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("mixer", ALL)
def test_an_answer_is_the_greedy_line(output: Path, mixer: str) -> None:
    """That of the argmax of whole sequences, without a cache, whatever stands beside it in the batch."""
    model, tokenizer, ends = long._loaded(str(model_folder(output, "small", mixer)), 0, "cpu")
    assert {tokenizer.decode([i]) for i in ends} >= {"\n"} and tokenizer.eos_token_id in ends
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)  # of fresh weights one token is always the likeliest
    windows = torch.stack([torch.arange(7, 47), torch.arange(107, 147)])
    found = long.answer(model, tokenizer, windows, 6, ends, autocast=False)
    wanted = []
    for window in windows:
        ids = window[None]
        while ids.shape[1] < 46 and int(ids[0, -1]) not in ends:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        wanted.append(tokenizer.decode(ids[0, 40:], skip_special_tokens=True).split("\n")[0])
    assert found == wanted and found[0] != found[1]


def test_attention_gets_another_rotary_base_and_nothing_else_changes(output: Path) -> None:
    ids = torch.arange(5, 45)[None]
    for mixer in ("gka", "attention"):
        model = GKAForCausalLM.from_pretrained(model_folder(output, "small", mixer)).eval()
        changed = long.longer(model, 4000, 1e6).eval()
        assert changed.config.max_position_embeddings == 4000
        before, after = model(ids).logits, changed(ids).logits
        assert torch.equal(before[:, 0], after[:, 0])  # position 0 is turned by nothing
        assert torch.equal(before, after) == (mixer == "gka")
        assert model.config.max_position_embeddings < 4000


def test_the_small_form(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From what `lm` has left, each part when it is asked for; what is there is not measured again."""
    arguments = ["evidence", "long", "--output", str(output), "--device", "cpu", "--only", "mixer=attention"]
    assert command_line.main([*arguments, "part=score", "length=512"]) == 2
    assert "part=continue mixer=attention" in capsys.readouterr().err
    assert command_line.main(arguments) == 0
    entries = Record(output / "long.json", "long").entries
    assert [e["cell"]["part"] for e in entries] == ["continue", *["score"] * 4]
    assert len(entries[0]["result"]["train loss"]) == 4 and entries[0]["result"]["diverged"] is None
    assert all(0 <= e["result"]["score"] <= 1 and len(e["result"]["each"]) == 2 for e in entries[1:])
    kept = GKAForCausalLM.from_pretrained(output / "long-models/small/attention")
    assert kept.config.rope_parameters["rope_theta"] == long.ROPE_THETA
    capsys.readouterr()
    assert command_line.main(arguments) == 0 and "5 cells, 0 to run" in capsys.readouterr().err
    text = write_page(output).read_text(encoding="utf-8")
    assert ["tokens", "softmax attention"] in rows_of(text)
    full = (output / "long.md").read_text(encoding="utf-8")
    assert "LongQA, F1" in full and "RAG, F1" not in full
    assert_drawn(output / "long.png")


def test_without_the_models_of_lm_it_says_what_to_do(output: Path, tmp_path: Path) -> None:
    shutil.copytree(output / "corpus-small", tmp_path / "corpus-small")
    shutil.copytree(output / "questions-small", tmp_path / "questions-small")
    (cell, *_) = long.cells("small")
    with pytest.raises(
        long.UserError, match="there is no model; train it with `python -m experiments evidence lm --size small`"
    ):
        long.run({**cell, "size": "small", "corpus": "0"}, tmp_path / "long" / "0", torch.device("cpu"))


def test_a_model_of_another_training_is_not_asked(output: Path, tmp_path: Path) -> None:
    cell = {
        "mixer": "gka",
        "part": "score",
        "task": "rag",
        "length": 512,
        "examples": 2,
        "rows": 8,
        "size": "small",
    }
    (tmp_path / long._RECIPE).write_text(json.dumps({**long._recipe(cell), "rows": 9}))
    with pytest.raises(long.UserError, match="no trained model; train it with --only"):
        long._trained(tmp_path, cell, torch.device("cpu"))


def test_the_page_shows_means_of_what_is_complete(tmp_path: Path) -> None:
    """A mean stands only where all the tasks that were asked have a score."""

    def entry(mixer: str, task: str, length: int, score: float) -> dict[str, Any]:
        cell = {"mixer": mixer, "part": "score", "task": task, "length": length, "examples": 20, "seq_len": 4096}
        each = [score - 0.1, score + 0.1 * (1 + 2 * (mixer == "gka"))] if task == "vt" else [score, score]
        return {"cell": cell, "result": {"score": score, "exact match": score / 2, "each": each}}

    entries = [entry("gka", "vt", 4096, 0.5), entry("gka", "cwe", 4096, 1.0), entry("gdn", "vt", 4096, 0.25)]
    entries += [entry("gdn", "cwe", 4096, 0.75), entry("gka", "vt", 8192, 0.1), entry("gka", "rag", 4096, 0.4)]
    text = long.section(entries, tmp_path / "picture.png")
    rows = rows_of(text)
    for row in (["4096", "75.0", "50.0"], ["8192", "", ""], ["4096", "40.0 (20.0)", ""], ["vt", "10.0", ""]):
        assert row in rows
    assert re.search(r"4096 tokens[^.]*\+30\.0 ± 5\.0[^.]*Gated DeltaNet", text)
    assert not re.search(r"8192 tokens \+", text) and "20 percent" in text and "LongQA" not in text
    assert_drawn(tmp_path / "picture.png")


def test_the_cells_share_rows_rate_and_steps() -> None:
    cells = long.cells("full")
    trained = [cell for cell in cells if cell["part"] == "continue"]
    assert [cell["mixer"] for cell in trained] == ["gka", "gla", "gdn", "mamba2", "attention", "hybrid"]
    assert all({**cell, "mixer": "gka"} == trained[0] for cell in trained)
    assert 9e6 < trained[0]["rows"] * trained[0]["seq_len"] < 11e6
    lengths = {cell["length"] for cell in cells if cell["part"] == "score"}
    assert lengths == {1 << n for n in range(12, 18)} and len(cells) == 6 * (1 + 6 * 13)
