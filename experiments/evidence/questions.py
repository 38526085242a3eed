"""What the experiment `long` trains on and asks: made once for a corpus and a size, kept as tokens.

    OUTPUT/questions-SIZE/
        rows.npy        [rows, row] token ids: training rows
        counted.npy     [rows, row] bool: tokens that the loss counts
        tests.npy       the test windows, one after the other
        index.json      the plan, of what corpus, where in tests.npy the windows of a task and length stand

An example is a prompt, " " + answer and a line end. It follows the end token, as a document does, and what stands
before that is text of the corpus's training files:

    training row    text, then <end> example <end> example ..  of one or more tasks, in random order
    test window     text, then <end> prompt, so much text that all windows of a task and length are equally long

so windows can be read side by side without a mask. Half of the rows are nothing but text. Counted are the tokens
of answers with their line ends, and one in TEXT_EVERY of the text, drawn at random: prompts, of noise for the most
part, teach nothing, and text would drown the answers. Lengths are tokens of prompt and answer by the corpus's
tokenizer, for LongQA and RAG as make_long_qa counts them; short examples get more of the rows, as they are many.

Test questions of LongQA and RAG are about files that the corpus holds out: no training, of the language models or
here, has read these files (maybe copies of parts of them, see corpus.py). Needles of the splits share no names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gka.hf.folders import begin_folder, end_folder
from gka.training.data import encode, load_tokenizer
from gka.training.errors import UserError

from ..tasks.collection import Collection
from ..tasks.examples import Example
from ..tasks.long_qa import make_long_qa
from ..tasks.needles import TASKS, completion, make_needles
from . import corpus as text

IGNORE = -100
TEXT_EVERY = 32
# Tokens of a training example beside prompt and answer: line end, end token, and what their borders add.
_SPARE = 4
_PART_BYTES = 12_000_000  # of each part's files that LongQA and RAG ask about
_MOST_PROCESSES = 8


@dataclass(frozen=True)
class Plan:
    """How much is made.

    Attributes:
        row: tokens of a training row.
        rows: training rows.
        trained: (length, rows filled with examples of it), half of the rows in all.
        tested: (length, examples of each task).
        tasks: names of TASKS, "long_qa", "rag".
        passage_chars: of the collection.
        in_parallel: whether other processes help; starting them takes seconds.
    """

    row: int
    rows: int
    trained: tuple[tuple[int, int], ...]
    tested: tuple[tuple[int, int], ...]
    tasks: tuple[str, ...]
    passage_chars: int
    in_parallel: bool


PLANS = {
    "small": Plan(
        row=1024,
        rows=8,
        trained=((512, 2), (1024, 2)),
        tested=((512, 2), (1024, 2)),
        tasks=("niah_single_1", "long_qa"),
        passage_chars=200,
        in_parallel=False,
    ),
    "full": Plan(
        row=1 << 15,
        rows=320,
        trained=((1 << 10, 64), (1 << 11, 32), (1 << 12, 24), (1 << 13, 16), (1 << 14, 12), (1 << 15, 12)),
        tested=((1 << 12, 20), (1 << 13, 20), (1 << 14, 20), (1 << 15, 20), (1 << 16, 8), (1 << 17, 8)),
        tasks=(*TASKS, "long_qa", "rag"),
        passage_chars=2000,
        in_parallel=True,
    ),
}


class Tests(NamedTuple):
    """The test examples of a task and a length.

    Attributes:
        windows: [N, T] int64, each ends where the answer begins.
        answers: references of each.
        longest: tokens of the longest right answer, its line end included.
    """

    windows: Tensor
    answers: list[list[str]]
    longest: int


@dataclass(frozen=True)
class Questions:
    """What `prepare` made.

    Attributes:
        folder: where it lies.
        index: what index.json holds.
    """

    folder: Path
    index: dict[str, Any]

    @classmethod
    def load(cls, output: Path, size: str) -> Questions:
        """Those of an output folder."""
        folder = _folder(output, size)
        return cls(folder, json.loads((folder / "index.json").read_text(encoding="utf-8")))

    def rows(self) -> Rows:
        """The training rows."""
        return Rows(
            np.load(self.folder / "rows.npy", mmap_mode="r"), np.load(self.folder / "counted.npy", mmap_mode="r")
        )

    def tests(self, task: str, length: int) -> Tests:
        """The test examples of a task and a length. KeyError if there are none."""
        group = self.index["tests"][f"{task} {length}"]
        N, T, start = len(group["answers"]), group["tokens"], group["start"]
        windows = np.load(self.folder / "tests.npy", mmap_mode="r")[start : start + N * T]
        tokens = torch.from_numpy(windows.reshape(N, T).astype(np.int64))
        return Tests(tokens, group["answers"], group["longest"])


class Rows(Dataset[dict[str, Tensor]]):
    """Training rows as {"input_ids": [row] int64, "labels": the same, IGNORE where nothing is counted}.

    Args:
        tokens: [rows, row]. counted: [rows, row] bool.
    """

    def __init__(self, tokens: np.ndarray, counted: np.ndarray) -> None:
        self.tokens, self.counted = tokens, counted

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index].astype(np.int64)
        labels = np.where(self.counted[index], tokens, IGNORE)
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


def prepare(output: Path, size: str, data: Sequence[str] | None) -> dict[str, str]:
    """Make the corpus and the questions that are not there yet.

    Returns:
        {"corpus": fingerprint}, as the corpus's own `prepare`, whose arguments are these.

    Raises:
        UserError: as the corpus's; or its files have too little text, or too few facts in Python sources.
    """
    known = text.prepare(output, size, data)
    folder, plan = _folder(output, size), PLANS[size]
    wanted = {**known, "plan": json.loads(json.dumps(dataclasses.asdict(plan)))}
    file = folder / "index.json"
    if file.is_file() and wanted.items() <= json.loads(file.read_text(encoding="utf-8")).items():
        return known
    start = time.perf_counter()
    partial = begin_folder(folder, overwrite=True)
    index = _write(partial, text.Corpus.load(output, size), plan, text.FRACTION[size])
    (partial / "index.json").write_text(json.dumps({**wanted, **index}, indent=1) + "\n", encoding="utf-8")
    end_folder(partial, folder)
    print(f"{folder}: made in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return known


def _folder(output: Path, size: str) -> Path:
    return output / f"questions-{size}"


# Examples


@dataclass(frozen=True)
class _Job:
    task: str
    split: Literal["train", "test"]
    length: int
    count: int


class _Question(NamedTuple):
    """An example as tokens."""

    prompt: np.ndarray
    answer: np.ndarray
    references: tuple[str, ...]


def _jobs(plan: Plan) -> list[_Job]:
    """What is to be made, the largest first; examples of a training length are shared out among the tasks."""
    jobs = [_Job(task, "test", length, count) for length, count in plan.tested for task in plan.tasks]
    for length, rows in plan.trained:
        share, more = divmod(rows * plan.row // length, len(plan.tasks))
        counts = [share + (number < more) for number in range(len(plan.tasks))]
        first = len(jobs) % len(plan.tasks)  # not always the same tasks have one more
        tasks = [*plan.tasks[first:], *plan.tasks[:first]]
        jobs += [_Job(task, "train", length, n) for task, n in zip(tasks, counts, strict=True) if n]
    return sorted(jobs, key=lambda job: -job.length * job.count)


def _all_questions(corpus: text.Corpus, plan: Plan, fraction: float) -> dict[_Job, list[_Question]]:
    """Needles by other processes, where they help; what asks about the collection by this one."""
    jobs, tokenizer = _jobs(plan), str(corpus.folder / "tokenizer")
    needles = [job for job in jobs if job.task in TASKS]

    def asked() -> dict[_Job, list[_Question]]:
        collection = Collection.read(
            corpus.data, passage_chars=plan.passage_chars, test_fraction=fraction, part_bytes=_PART_BYTES
        )
        return {job: _questions(tokenizer, job, collection) for job in jobs if job.task not in TASKS}

    if not plan.in_parallel:
        return {**asked(), **{job: _questions(tokenizer, job) for job in needles}}
    helpers = min(_MOST_PROCESSES, max(1, (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(helpers, mp_context=get_context("spawn")) as pool:
        try:
            waiting = {job: pool.submit(_questions, tokenizer, job) for job in needles}
            return {**asked(), **{job: future.result() for job, future in waiting.items()}}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _questions(tokenizer_folder: str, job: _Job, collection: Collection | None = None) -> list[_Question]:
    """The examples of a job; tests of all lengths have the same names, training examples of each length others."""
    tokenizer = _tokenizer(tokenizer_folder)
    training = job.split == "train"
    common: dict[str, Any] = {
        "task": job.task,
        "length": job.length - _SPARE if training else job.length,
        "count": job.count,
        "seed": job.length if training else 0,
        "split": job.split,
        "num_tokens": _counter(tokenizer),
    }
    examples = make_needles(**common) if collection is None else make_long_qa(collection, **common)
    return [_tokenised(tokenizer, example) for example in examples]


def _tokenised(tokenizer: Any, example: Example) -> _Question:
    prompt, answer = (encode(tokenizer, s.encode()) for s in (example.prompt, completion(example) + "\n"))
    return _Question(prompt, answer, example.answers)


@cache
def _tokenizer(folder: str) -> Any:
    return load_tokenizer(folder)


def _counter(tokenizer: Any) -> Callable[[str], int]:
    """Tokens of a text as gka.training.data.encode gives them, two to three times as fast."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # text that spells the end token is text

    def count(some: str) -> int:
        return len(backend.encode_batch_fast([some], add_special_tokens=False)[0])

    return count


# Rows and windows


def _write(folder: Path, corpus: text.Corpus, plan: Plan, fraction: float) -> dict[str, Any]:
    """Write the arrays; what the index says of them."""
    numbers = np.random.default_rng(0)
    source = np.memmap(corpus.folder / "data" / "train.bin", corpus.manifest.dtype, mode="r")
    if len(source) <= plan.row:
        raise UserError(
            f"too little text: {len(source):,} training tokens, a row has {plan.row:,}; give --data more files"
        )
    end = corpus.tokenizer.eos_token_id

    def read(count: int) -> np.ndarray:
        """Consecutive tokens of the training text from a random place."""
        first = numbers.integers(len(source) - count)
        return np.asarray(source[first : first + count])

    made = _all_questions(corpus, plan, fraction)
    tests: list[np.ndarray] = []
    groups, start = {}, 0
    for (length, count), task in product(plan.tested, plan.tasks):
        questions = made[_Job(task, "test", length, count)]
        T = 1 + max(len(question.prompt) for question in questions)
        for question in questions:
            tests += [read(T - 1 - len(question.prompt)), np.asarray([end]), question.prompt]
        groups[f"{task} {length}"] = {
            "start": start,
            "tokens": T,
            "longest": max(len(question.answer) for question in questions),
            "answers": [list(question.references) for question in questions],
        }
        start += T * len(questions)
    trained = [question for job in _jobs(plan) if job.split == "train" for question in made[job]]
    filled = _shared_out([1 + len(q.prompt) + len(q.answer) for q in trained], plan)
    tokens = np.empty((plan.rows, plan.row), source.dtype)
    counted = np.zeros(tokens.shape, bool)
    answers = 0
    for number in range(plan.rows):
        inside = [trained[i] for i in numbers.permutation(filled[number])] if number < len(filled) else []
        at = plan.row - sum(1 + len(q.prompt) + len(q.answer) for q in inside)
        tokens[number, :at] = read(at)
        counted[number, :at] = numbers.random(at) < 1 / TEXT_EVERY
        for question in inside:
            whole = np.concatenate([[end], question.prompt, question.answer])
            tokens[number, at : at + len(whole)] = whole
            at += len(whole)
            counted[number, at - len(question.answer) : at] = True
            answers += len(question.answer)
    np.save(folder / "rows.npy", tokens)
    np.save(folder / "counted.npy", counted)
    np.save(folder / "tests.npy", np.concatenate(tests).astype(source.dtype))
    return {
        "examples": dict(Counter(job.task for job, q in made.items() if job.split == "train" for _ in q)),
        "counted tokens": {"answers": answers, "text": int(counted.sum()) - answers},
        "tests": groups,
    }


def _shared_out(sizes: Sequence[int], plan: Plan) -> list[list[int]]:
    """Which examples each row takes: the longest first, each into the row with the most room.

    They fit: lengths and row are powers of two, and no example is longer than its length.
    """
    rows: list[list[int]] = [[] for _ in range(sum(count for _, count in plan.trained))]
    room = np.full(len(rows), plan.row)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = int(room.argmax())
        rows[row].append(i)
        room[row] -= sizes[i]
        assert room[row] >= 0
    return rows
