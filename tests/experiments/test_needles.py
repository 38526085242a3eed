"""The tasks of RULER are solvable in one way, as long as asked for, and what they claim."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from experiments.tasks import names
from experiments.tasks.aggregation import COMMON, REPEATS, zeta_counts
from experiments.tasks.examples import Example, string_recall
from experiments.tasks.haystack import Draft, Setting, Text, standard_sentences
from experiments.tasks.names import ADJECTIVES, NOUNS, Names, split_of, words_of
from experiments.tasks.needles import TASKS, Task, completion, make_needles
from gka.training.errors import UserError

COUNTED = {"cwe", "fwe"}
NEEDLE = re.compile(r"A secret (?:number|code) of (\S+) is (\S+)\.(?=\s)")
ASSIGNMENT = re.compile(r"VAR ([A-Z]{5}) = (VAR [A-Z]{5}|\d{5})\.")
VALUE = {"number": r"\d{7}", "code": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"}


def count_bytes(text: str) -> int:
    return len(text.encode())


def count_words(text: str) -> int:
    return len(text.split())


@cache
def _bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(standard_sentences().read(0, 20_000), trainer)
    return tokenizer


def count_bpe(text: str) -> int:
    return len(_bpe().encode(text).ids)


make = partial(make_needles, length=8192, count=1, seed=0, num_tokens=count_bytes)


def _body(prompt: str) -> tuple[str, str]:
    """Haystack (with its instruction) and question (with the start of the answer)."""
    haystack, question, start = prompt.rsplit("\n", 2)
    assert question.endswith("?") and not start.endswith(" ")
    return haystack + "\n", question


def solve(task: str, prompt: str) -> list[str]:
    """The answer by reading the prompt alone."""
    haystack, question = _body(prompt)
    if task == "cwe":
        return [word for word, _ in Counter(re.findall(r"\d+\. (\w+)", haystack)).most_common(10)]
    if task == "fwe":
        words = haystack.split("\n\n")[1].split()
        return [word for word, _ in Counter(words).most_common(4) if word != "...."]
    if task == "vt":
        value = re.findall(r"\d{5}", question)[0]
        worth: dict[str, str] = {}
        for variable, source in ASSIGNMENT.findall(haystack):
            assert variable not in worth
            worth[variable] = worth[source[4:]] if source.startswith("VAR") else source
        return [variable for variable in worth if worth[variable] == value]
    asked = re.split(r", | and ", question.removesuffix("?").split(" of ", 1)[1])
    return [value for key in asked for found, value in NEEDLE.findall(haystack) if found == key]


@pytest.mark.parametrize("task", TASKS)
@given(seed=st.integers(-(10**9), 10**9), split=st.sampled_from(["train", "test"]))
def test_the_answer_is_in_the_prompt_and_the_only_one(task: str, seed: int, split: str) -> None:
    (example,) = make(task, length=6000, seed=seed, split=split)
    found = solve(task, example.prompt)
    if task == "niah_multivalue":  # asked for in no order
        assert sorted(found) == sorted(example.answers)
    else:
        assert len(found) == len(set(found)) and set(found) == set(example.answers)
    if task in ("niah_multiquery", "vt"):
        assert tuple(found) == example.answers
    assert TASKS[task].score(completion(example), example.answers) == 1.0
    assert TASKS[task].score(" I do not know", example.answers) == 0.0


@pytest.mark.parametrize(
    "task, needles, keys, answers, called",
    [
        ("niah_single_1", 1, 1, 1, "number"),
        ("niah_single_2", 1, 1, 1, "number"),
        ("niah_single_3", 1, 1, 1, "code"),
        ("niah_multikey_1", 4, 4, 1, "number"),
        ("niah_multikey_2", None, None, 1, "number"),
        ("niah_multikey_3", None, None, 1, "code"),
        ("niah_multivalue", 4, 1, 4, "number"),
        ("niah_multiquery", 4, 4, 4, "number"),
    ],
)
def test_needles_are_of_the_kind_and_number_that_the_table_says(
    task: str, needles: int | None, keys: int | None, answers: int, called: str
) -> None:
    for example in make(task, count=10):
        haystack, _ = _body(example.prompt)
        pairs = NEEDLE.findall(haystack)
        values = [value for _, value in pairs]
        key = VALUE["code"] if task == "niah_multikey_3" else r"[a-z]+-[a-z]+"
        assert all(re.fullmatch(key, name) and re.fullmatch(VALUE[called], value) for name, value in pairs)
        assert len(set(values)) == len(values) and len(example.answers) == answers == len(example.depths)
        for name in {name for name, _ in pairs} | set(values):
            assert haystack.count(name) == (4 if keys == 1 and needles == 4 and "-" in name else 1)
        if needles is None:
            lines = haystack.strip().split("\n")[2:]
            assert len(lines) == len(pairs) == len({name for name, _ in pairs}) > 50
        else:
            assert (len(pairs), len({name for name, _ in pairs})) == (needles, keys)
        assert ("The kettle is warm." in haystack) == (task == "niah_single_1")


def test_variables_stand_in_three_chains_of_five_in_order() -> None:
    for example in make("vt", count=20):
        found = ASSIGNMENT.findall(example.prompt)
        values = [source for _, source in found if not source.startswith("VAR")]
        assert len(found) == 15 and len(set(values)) == 3
        assert [source[4:] for source in (dict(found)[name] for name in example.answers[1:])] == [
            *example.answers[:-1]
        ]
        assert sorted(example.depths) == list(example.depths)


@pytest.mark.parametrize("length, often, seldom", [(4000, 6, 1), (30_000, *REPEATS)])
def test_common_words_stand_as_often_as_said(length: int, often: int, seldom: int) -> None:
    for example in make("cwe", length=length, count=5):
        listed = re.findall(r"(\d+)\. (\w+)", _body(example.prompt)[0])
        assert [int(number) for number, _ in listed] == [*range(1, len(listed) + 1)]
        counts = Counter(word for _, word in listed)
        assert {counts.pop(word) for word in example.answers} == {often} and len(example.answers) == COMMON
        assert set(counts.values()) == {seldom} and len(counts) > COMMON


def test_frequent_words_follow_the_zeta_distribution() -> None:
    (example,) = make("fwe", length=60_000)
    counts = Counter(_body(example.prompt)[0].split("\n\n")[1].split())
    ordered = [count for _, count in counts.most_common()]
    assert counts["...."] == ordered[0] and [counts[word] for word in example.answers] == ordered[1:4]
    for rank, count in enumerate(ordered[:10], 1):
        assert count == pytest.approx(ordered[0] / rank**2, abs=1)
    assert ordered[0] / sum(ordered) == pytest.approx(0.61, abs=0.02)  # 1 / zeta(2), and the tail left out


@given(st.integers(100, 10**6))
def test_wanted_words_are_never_tied(drawn: int) -> None:
    counts = zeta_counts(drawn)
    assert counts[0] > counts[1] > counts[2] > counts[3] > counts[4] >= 1 and sum(counts) <= drawn


@pytest.mark.parametrize("count", [count_bytes, count_words, count_bpe])
@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_answer_fill_the_length(task: str, count) -> None:
    for length, share in ((2500, 0.94), (12_000, 0.985)):
        for example in make(task, length=length, count=2, num_tokens=count):
            assert share * length < count(example.prompt + completion(example)) <= length


@pytest.mark.parametrize("task", TASKS)
def test_long_prompts_are_counted_a_few_times_and_made_in_seconds(task: str) -> None:
    read = 0

    def count(text: str) -> int:
        nonlocal read
        read += len(text)
        return len(text) // 4

    standard_sentences()
    start = time.perf_counter()
    (example,) = make(task, length=131_072, num_tokens=count)
    assert time.perf_counter() - start < 5
    assert read < 8 * len(example.prompt)


@pytest.mark.parametrize("task", sorted(set(TASKS) - COUNTED))
def test_depths_are_where_needles_stand_and_spread_evenly(task: str) -> None:
    depths: list[float] = []
    for example in make(task, count=200):
        haystack, _ = _body(example.prompt)
        for answer, depth in zip(example.answers, example.depths, strict=True):
            at = haystack.index(f"VAR {answer} = " if task == "vt" else f" is {answer}.")
            if task != "vt":
                at = haystack.rindex("A secret", 0, at)
            assert depth == at / len(example.prompt)
        depths += example.depths
    assert sum(depths) / len(depths) == pytest.approx(0.5, abs=0.06)
    assert min(Counter(int(10 * depth) for depth in depths)[tenth] for tenth in range(10)) > len(depths) / 40


def test_the_counted_words_have_no_depths() -> None:
    assert all(example.depths == () for task in COUNTED for example in make(task, count=2))


@pytest.mark.parametrize("task", TASKS)
def test_the_same_arguments_give_the_same_examples(task: str) -> None:
    examples = make(task, length=4096, count=4)
    assert make(task, length=4096, count=4) == examples and make(task, length=4096, count=2) == examples[:2]
    assert len({example.prompt for example in examples + make(task, length=4096, count=4, seed=1)}) == 8
    longer = make(task, length=8192, count=4)
    assert [example.answers for example in longer] == [example.answers for example in examples]


@pytest.mark.slow
def test_examples_do_not_depend_on_the_process() -> None:
    code = (
        "from experiments.tasks.needles import TASKS, make_needles\n"
        "print([make_needles(task, length=5000, count=2, seed=3, num_tokens=len) for task in TASKS], hash('x'))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment).stdout
    made, hashed = output.strip().rsplit(" ", 1)
    here = [make_needles(task, length=5000, count=2, seed=3, num_tokens=len) for task in TASKS]
    assert made == str(here) and int(hashed) != hash("x")


def _names(task: str, example: Example) -> set[str]:
    """All names in a prompt."""
    haystack, _ = _body(example.prompt)
    if task == "cwe":
        return set(re.findall(r"\d+\. (\w+)", haystack))
    if task == "fwe":
        return set(haystack.split("\n\n")[1].split()) - {"...."}
    if task == "vt":
        return set(re.findall(r"\b(?:[A-Z]{5}|\d{5})\b", haystack))
    return {name for pair in NEEDLE.findall(haystack) for name in pair}


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_names(task: str) -> None:
    found = {}
    for split in ("train", "test"):
        examples = [*make(task, count=10, split=split), *make(task, count=10, split=split, seed=1)]
        found[split] = set().union(*(_names(task, example) for example in examples))
        assert {split_of(name) for name in found[split]} == {split} and len(found[split]) >= 40
    assert not found["train"] & found["test"]


def test_no_two_examples_share_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def draft(setting: Setting) -> Draft:
        drawn.extend(setting.stream(purpose).random() for purpose in ("words", "order"))
        return Draft(lambda n: Text("x" * n, "", ()), least=1)

    for task in ("niah_single_1", "niah_single_2"):
        monkeypatch.setitem(TASKS, task, Task("", draft))
        for split in ("train", "test"):
            for seed in (-1, 0, 1, 2, 10):
                make(task, split=split, seed=seed, count=12)
    assert len(set(drawn)) == 2 * 2 * 2 * 5 * 12  # purposes, tasks, splits, seeds, examples


def test_every_word_belongs_to_one_split_and_about_half_to_each() -> None:
    train, test = words_of("train"), words_of("test")
    assert not set(train) & set(test) and len(train) + len(test) == len(ADJECTIVES) * len(NOUNS) > 90_000
    assert len(train) == pytest.approx(len(test), rel=0.03)


def test_no_key_of_words_hides_in_another() -> None:
    for parts, hides in ((ADJECTIVES, str.endswith), (NOUNS, str.startswith)):
        assert len(set(parts)) == len(parts) and all(part.isalpha() and part.islower() for part in parts)
        assert not [(a, b) for a in parts for b in parts if a != b and hides(a, b)]


def test_names_of_the_filler_are_not_drawn() -> None:
    taken = words_of("test")[: len(words_of("test")) * 9 // 10]
    filler = [f"There is {word.upper()} number {i}." for i, word in enumerate(taken)]
    for example in make("niah_multikey_1", count=8, filler=filler):
        assert not {name for name, _ in NEEDLE.findall(_body(example.prompt)[0])} & set(taken)


def test_names_that_have_run_out_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "words_of", lambda split: words_of("test")[:3])
    drawn = Names(random.Random(0), "test", "")
    assert {drawn.draw("word") for _ in range(3)} == set(words_of("test")[:3])
    with pytest.raises(UserError, match="too few names of the kind 'word'"):
        drawn.draw("word")


@pytest.mark.parametrize("task", TASKS)
def test_a_length_too_small_is_refused_with_the_least(task: str) -> None:
    with pytest.raises(UserError, match=r"too small .* at least \d+ tokens") as refused:
        make(task, length=80, count=5)
    least = int(re.findall(r"at least (\d+)", str(refused.value))[0])
    sizes = [count_bytes(example.prompt + completion(example)) for example in make(task, length=least, count=5)]
    assert len(sizes) == 5 and max(sizes) <= least
    with pytest.raises(UserError, match=f"at least {least} tokens"):
        make(task, length=least - 1, count=5)


def test_a_length_beyond_the_names_is_refused() -> None:
    with pytest.raises(UserError, match=r"no more than \d+ tokens"):
        make("niah_multikey_2", length=1_000_000, num_tokens=count_words)


def test_mistakes_are_named() -> None:
    for change, message in (
        ({"task": "niah"}, "unknown task 'niah': choose one of niah_single_1, "),
        ({"split": "dev"}, "unknown split 'dev'"),
        ({"count": -1}, "count must be at least 0, got -1"),
        ({"template": "{start}{text}"}, "template must hold"),
        ({"template": "{text}{text}{start}"}, "template must hold"),
        ({"template": "{start}{text}{start}"}, "template must hold"),
        ({"template": "{text}"}, "template must hold"),
        ({"filler": []}, "filler has 0 different sentences, natural text needs at least 50"),
        ({"filler": ["One two three."] * 1000}, "filler has 1 different"),
        ({"filler": "One two three."}, "filler must be a list of sentences"),
        ({"num_tokens": lambda text: 7}, "num_tokens does not grow"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            make(**{"task": "niah_single_2", **change})
    assert make("vt", count=0) == []


def test_the_filler_is_what_stands_around_the_needles() -> None:
    filler = [f"This is sentence {number} of the filler." for number in range(60)]
    (example,) = make("niah_single_2", filler=filler)
    haystack = _body(example.prompt)[0].split("\n\n")[1]
    whole = re.findall(r"This is sentence (\d+) of the filler\.", haystack)
    assert len(whole) > 150  # it is longer than the filler, and goes round
    assert all((int(a) + 1) % 60 == int(b) for a, b in pairwise(whole))
    rest = NEEDLE.sub("", re.sub(r"This is sentence \d+ of the filler\.", "", haystack)).strip()
    assert rest == "" or rest.endswith("...")


def test_the_template_stands_around_task_and_answer() -> None:
    plain = make("niah_single_2")[0]
    (example,) = make("niah_single_2", template="<user>{text}</user><model>{start}")
    assert example.prompt.startswith("<user>Secret numbers") and len(example.prompt) <= 8192
    assert re.search(r"\?</user><model>The secret number of \S+ in the text is$", example.prompt)
    assert example.answers == plain.answers
    assert example.prompt[round(example.depths[0] * len(example.prompt)) :].startswith("A secret number of")


def test_recall_counts_each_reference() -> None:
    (example,) = make("niah_multiquery")
    assert string_recall(", ".join(example.answers[:3]), example.answers) == 0.75
