"""Training rows and test questions of the experiment `long`; made once per corpus and size, stored as tokens.

    OUTPUT/questions-SIZE/
        rows.npy        [rows, row] token ids: training rows
        counted.npy     [rows, row] bool: tokens that the loss counts
        tests.npy       the test windows, one after the other
        index.json      the plan, the corpus, and the position in tests.npy of the windows of a task and length

An example is a prompt, " " + answer and a line end. It follows the end token, as a document does. Before that
token there is text from the training files of the corpus:

    training row    text, then <end> example <end> example ..  of one or more tasks, in random order
    test window     text, then <end> prompt; all windows of a task and length have the same length

so that windows can be read in one batch without a mask. Half of the rows contain text only. The loss counts the
tokens of answers with their line ends, and one in TEXT_EVERY tokens of text, drawn at random. Prompts are not
counted, because they are mostly noise; most of the text is not counted, because it would outweigh the answers.
Lengths are tokens of prompt and answer by the tokenizer of the corpus; make_long_qa counts them for LongQA and
RAG. Short examples fill more rows than long ones.

Test questions of LongQA and RAG are about held-out files of the corpus. No training, of the language models or
here, reads these files (copies of parts of them may occur, see corpus.py). Needles of the two splits share no
names.
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
# Tokens of a training example besides prompt and answer: line end, end token, and extra tokens at the joints.
_SPARE = 4
_PART_BYTES = 12_000_000  # fraction of the files of each part that LongQA and RAG ask about
_MOST_PROCESSES = 8


@dataclass(frozen=True)
class Plan:
    """The amount of data to make.

    Attributes:
        row: tokens per training row.
        rows: number of training rows.
        trained: (length, rows filled with examples of this length), half of the rows in total.
        tested: (length, examples of each task).
        tasks: names of TASKS, "long_qa", "rag".
        passage_chars: characters per passage of the collection.
        in_parallel: whether to use several processes; their start takes seconds.
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
        windows: [N, T] int64; each ends at the start of the answer.
        answers: the reference answers for each window.
        longest: tokens of the longest correct answer, including its line end.
    """

    windows: Tensor
    answers: list[list[str]]
    longest: int


@dataclass(frozen=True)
class Questions:
    """The data written by `prepare`.

    Attributes:
        folder: the folder of the data.
        index: the content of index.json.
    """

    folder: Path
    index: dict[str, Any]

    @classmethod
    def load(cls, output: Path, size: str) -> Questions:
        """Load the questions of an output folder."""
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
    """Training rows as {"input_ids": [row] int64, "labels": the same, with IGNORE for tokens that do not count}.

    Args:
        tokens: [rows, row].
        counted: [rows, row] bool.
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
    """Make the corpus and the questions if they do not exist. The arguments are those of `corpus.prepare`.

    Returns:
        {"corpus": fingerprint}, as `corpus.prepare`.

    Raises:
        UserError: as `corpus.prepare`; or the files have too little text, or too few facts in Python sources.
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
    print(f"{folder}: written in {time.perf_counter() - start:.0f} s", file=sys.stderr)
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
    """The jobs, the largest first; the tasks share the examples of a training length."""
    jobs = [_Job(task, "test", length, count) for length, count in plan.tested for task in plan.tasks]
    for length, rows in plan.trained:
        share, more = divmod(rows * plan.row // length, len(plan.tasks))
        counts = [share + (number < more) for number in range(len(plan.tasks))]
        first = len(jobs) % len(plan.tasks)  # the tasks with one more example change
        tasks = [*plan.tasks[first:], *plan.tasks[:first]]
        jobs += [_Job(task, "train", length, n) for task, n in zip(tasks, counts, strict=True) if n]
    return sorted(jobs, key=lambda job: -job.length * job.count)


def _all_questions(corpus: text.Corpus, plan: Plan, fraction: float) -> dict[_Job, list[_Question]]:
    """The questions of all jobs: needles in parallel processes, questions about the collection in this process."""
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
    """The examples of a job. Tests of all lengths share names; training examples do not, from length to length."""
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
    """A function that counts the tokens of gka.training.data.encode; it is two to three times faster."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # text that spells the end token counts as text

    def count(some: str) -> int:
        return len(backend.encode_batch_fast([some], add_special_tokens=False)[0])

    return count


# Rows and windows


def _write(folder: Path, corpus: text.Corpus, plan: Plan, fraction: float) -> dict[str, Any]:
    """Write the arrays and return their entries for the index."""
    numbers = np.random.default_rng(0)
    source = np.memmap(corpus.folder / "data" / "train.bin", corpus.manifest.dtype, mode="r")
    if len(source) <= plan.row:
        raise UserError(
            f"too little text: {len(source):,} training tokens, one row needs {plan.row:,}; give --data more files"
        )
    end = corpus.tokenizer.eos_token_id

    def read(count: int) -> np.ndarray:
        """Consecutive tokens of the training text from a random position."""
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
    """The examples of each row: the longest example first, each into the row with the most room.

    All examples fit, because lengths and rows are powers of two and no example is longer than its length.
    """
    rows: list[list[int]] = [[] for _ in range(sum(count for _, count in plan.trained))]
    room = np.full(len(rows), plan.row)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = int(room.argmax())
        rows[row].append(i)
        room[row] -= sizes[i]
        assert room[row] >= 0
    return rows
