"""Synthetic long-context tasks of RULER (arXiv 2404.06654, section 3): needles, variables, counts of words.

A needle names a key and a value; at the end of the prompt the values of some keys are asked for:

    A secret number of brave-lantern is 4071253.  ..  What is the secret number of brave-lantern?
    The secret number of brave-lantern in the text is

    task               haystack        keys          values of a key   keys asked
    niah_single_1      noise           1 word        1 number          1
    niah_single_2      natural text    1 word        1 number          1
    niah_single_3      natural text    1 word        1 UUID            1
    niah_multikey_1    natural text    4 words       1 number          1
    niah_multikey_2    needles         words         1 number          1
    niah_multikey_3    needles         UUIDs         1 UUID            1
    niah_multivalue    natural text    1 word        4 numbers         1
    niah_multiquery    natural text    4 words       1 number          4
    vt, cwe, fwe       see aggregation.py

Needles stand at places drawn uniformly from the gaps between the haystack's sentences (or needles). No key and no
value stands in the haystack a second time (the key of niah_multivalue: more than four times), so the answer is
the only one. The wording is our own, so scores are of RULER's kind, not to be set beside published ones.

Splits share neither random numbers (the split's name is part of every seed) nor names: keys, values, variables and
words belong to one split each, by their hash (names.py). Both read the same natural text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from gka.training.errors import UserError

from .aggregation import common_words, frequent_words, variable_tracking
from .examples import Example, string_recall
from .haystack import NOISE, Draft, Sentences, Setting, Text, grow, noise, scatter, standard_sentences
from .names import Kind, Names, Split, words_of

TEMPLATE = "{text}\n{start}"
_LEAST_NEEDLES = 3  # others in a haystack of needles
_CALLED: dict[Kind, str] = {"number": "number", "uuid": "code"}


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        about: what is asked, in a line.
        draft: makes an example from its setting.
        natural: whether the haystack is natural text.
        score: of an answer (a text) by the references: RULER's, the share of the references found in it.
    """

    about: str
    draft: Callable[[Setting], Draft]
    natural: bool = False
    score: Callable[[str, Sequence[str]], float] = string_recall


def _needles(
    setting: Setting,
    haystack: Literal["noise", "natural", "needles"] = "natural",
    key: Kind = "word",
    value: Kind = "number",
    keys: int = 1,
    values: int = 1,
    asked: int = 1,
) -> Draft:
    """Needles in a haystack; the unit is a sentence of noise, a word of natural text, or a needle."""
    numbers = setting.stream("needles")
    natural = setting.filler if haystack == "natural" else None
    names = Names(numbers, setting.split, natural.lowered if natural else " ".join(NOISE).lower())
    called = _CALLED[value]
    values_of = {names.draw(key): [names.draw(value) for _ in range(values)] for _ in range(keys)}
    queries = numbers.sample(list(values_of), asked)
    pairs = [(key, value) for key in queries for value in values_of[key]]
    wanted = len(pairs)
    pairs += [(key, value) for key in values_of if key not in queries for value in values_of[key]]
    placed = [(numbers.random(), f"A secret {called} of {name} is {worth}.") for name, worth in pairs]
    begin = numbers.randrange(len(natural)) if natural else 0
    others: list[str] = []  # drawn when they are needed, always the same

    many = wanted > 1
    listed = ", ".join(queries[:-1]) + " and " + queries[-1] if asked > 1 else queries[0]
    of = f"{wanted} secret {called}s of {listed}" if many else f"secret {called} of {listed}"
    instruction = f"Secret {called}s are hidden in the text below. Remember them, you will be asked for some.\n\n"
    question = f"\n\nWhat {'are' if many else 'is'} the {of}?"
    start = f"The {of} in the text {'are' if many else 'is'}"

    def build(count: int) -> Text:
        if natural:
            hay = natural.read(begin, count)
        elif haystack == "noise":
            hay = noise(count)
        else:
            while len(others) < count:
                others.append(f"A secret {called} of {names.draw(key)} is {names.draw(value)}.")
            hay = others[:count]
        text, positions = scatter(hay, placed, "\n" if haystack == "needles" else " ")
        at = tuple(len(instruction) + position for position in positions[:wanted])
        return Text(instruction + text + question, start, tuple(value for _, value in pairs[:wanted]), at)

    if haystack != "needles":
        return Draft(build, least=1)
    most = len(words_of(setting.split)) * 3 // 4 if key == "word" else None  # to draw the last ones takes long
    return Draft(build, _LEAST_NEEDLES, most)


_natural = partial(Task, natural=True)

TASKS: dict[str, Task] = {
    "niah_single_1": Task("the number of a word, in noise", partial(_needles, haystack="noise")),
    "niah_single_2": _natural("the number of a word, in natural text", _needles),
    "niah_single_3": _natural("the UUID of a word, in natural text", partial(_needles, value="uuid")),
    "niah_multikey_1": _natural("the number of one of 4 words, in natural text", partial(_needles, keys=4)),
    "niah_multikey_2": Task(
        "the number of a word, among nothing but needles", partial(_needles, haystack="needles")
    ),
    "niah_multikey_3": Task(
        "the UUID of a UUID, among nothing but needles",
        partial(_needles, haystack="needles", key="uuid", value="uuid"),
    ),
    "niah_multivalue": _natural("the 4 numbers of a word, in natural text", partial(_needles, values=4)),
    "niah_multiquery": _natural("the numbers of 4 words, in natural text", partial(_needles, keys=4, asked=4)),
    "vt": Task("the 5 variables of a value, of 3 chains of assignments in noise", variable_tracking),
    "cwe": Task("the 10 words that stand in a list most often", common_words),
    "fwe": Task("the 3 words that a coded text has most often", frequent_words),
}


def completion(example: Example) -> str:
    """The right answer as the prompt goes on with it: a space, and the references with commas between."""
    return " " + ", ".join(example.answers)


def make_needles(
    task: str,
    *,
    length: int,
    count: int,
    seed: int,
    num_tokens: Callable[[str], int],
    filler: Sequence[str] | None = None,
    split: Split = "test",
    template: str = TEMPLATE,
) -> list[Example]:
    """Generate examples of a task; the same arguments give the same examples.

    Example i depends on the other arguments alone, not on `count`, and has the same names at every length.

    Args:
        task: one of TASKS.
        length: tokens of the prompt with its completion. An example has at most that many, and less than a 500th
            fewer, or so few fewer that one unit more would not fit (a sentence of noise, a word of natural text, a
            needle among needles, a word of cwe, a draw of fwe).
        count: examples, at least 0.
        seed: any whole number.
        num_tokens: tokens of a text by the model's tokenizer, without special tokens. It is called a handful of
            times for each example.
        filler: the sentences of natural text, in order; read from the start again where the prompt is longer. Only
            tasks with natural text read it. None takes sentences of the docstrings of this Python's standard
            library, the same for the same version of Python.
        split: "train" and "test" share neither random numbers nor names, whatever the seeds.
        template: of the prompt; `{text}` is the task and `{start}` the beginning of the answer, in this order,
            e.g. a chat's marks around them. It should end with `{start}`.

    Returns:
        Examples whose `depths` are those of the needles (vt: the assignments) of the answers, in their order,
        in characters of the prompt; none for cwe and fwe, whose words are everywhere. The prompt ends where the
        answer begins, without a space: see `completion`.

    Raises:
        UserError: unknown task or split, count below 0, a template without its parts, natural text without
            variety, or a length that is too small (the least is named) or greater than the task has names for.
    """
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    if split not in get_args(Split):
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(get_args(Split))}")
    if count < 0:
        raise UserError(f"count must be at least 0, got {count}")
    before, _, rest = template.partition("{text}")
    middle, _, after = rest.partition("{start}")
    if (
        before + "{text}" + middle + "{start}" + after != template
        or template.count("{text}") + template.count("{start}") > 2
    ):
        raise UserError(f"template must hold {{text}} and after it {{start}}, each once, got {template!r}")
    if filler is not None:
        sentences: Sentences | None = Sentences(filler)
    else:
        sentences = standard_sentences() if TASKS[task].natural else None

    def example(text: Text) -> Example:
        prompt = before + text.text + middle + text.start + after
        depths = tuple((len(before) + position) / len(prompt) for position in text.positions)
        return Example(prompt, text.answers, depths)

    def size(text: Text) -> int:
        whole = example(text)
        return num_tokens(whole.prompt + completion(whole))

    def draft(i: int) -> Draft:
        return TASKS[task].draft(Setting(f"{task} {split} {seed} {i}", split, sentences, length, num_tokens))

    # Drafts are made again below, alike: kept, each would hold all names of its prompt.
    least = max((size(each.build(each.least)) for each in map(draft, range(count))), default=0)
    if least > length:
        raise UserError(f"length {length} is too small for {task}: these examples need at least {least} tokens")
    return [example(grow(draft(i), size, length)) for i in range(count)]
