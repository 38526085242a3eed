"""Haystacks of the long-context tasks: how a prompt grows to a length in tokens, noise, and natural text.

A task makes a `Draft`: all of a prompt is decided but how many units (sentences, words, list entries) it has. With
size(n) the tokens of the prompt with n units and of its answer, and L the length asked for, `grow` looks for

    n  with  size(n) <= L  and either  size(n) > L - L/500  or  size(n + 1) > L

by interpolation between the greatest n known to fit and the smallest known not to, and by bisection where that is
slow. It counts a prompt of full length a handful of times, however many units it has.

Noise is one group of sentences over and over. Natural text is a list of sentences read from a random place on, at
its end from its start again, and cut off after a number of words; the default are sentences of the docstrings of
this Python's standard library, the same wherever the version of Python is.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from gka.training.data import find_files, read_texts
from gka.training.errors import UserError

from .names import Split

NOISE = (
    "The kettle is warm.",
    "The door is shut.",
    "The lamp is low.",
    "Rain falls on the roof.",
    "Nobody is in a hurry.",
)
MIN_SENTENCES = 50  # natural text of fewer different sentences would be noise by another name
_NEAR = 500  # a prompt is long enough once less than a 500th of the length is free
_SLOW = 4  # interpolations before every second guess is a bisection


class Setting(NamedTuple):
    """What one example is made from.

    Attributes:
        seed: names the example; `stream` derives its random numbers from it.
        split: that all names belong to.
        filler: natural text, for the tasks that have some.
        length: L, tokens.
        num_tokens: tokens of a text.
    """

    seed: str
    split: Split
    filler: Sentences | None
    length: int
    num_tokens: Callable[[str], int]

    def stream(self, purpose: str) -> random.Random:
        """Random numbers of the example for one purpose, the same on every call."""
        return random.Random(f"{self.seed} {purpose}")  # seeds by SHA-512 of the text, alike on every machine


class Text(NamedTuple):
    """A prompt before it is put into a template.

    Attributes:
        text: instruction, haystack and question.
        start: how the answer begins; the model goes on from here.
        answers: references, all wanted.
        positions: characters of `text` before each thing that has to be found.
    """

    text: str
    start: str
    answers: tuple[str, ...]
    positions: tuple[int, ...] = ()


class Draft(NamedTuple):
    """A prompt of any number n of units from `least` to `most` (None: no end); `build(n)` is always the same."""

    build: Callable[[int], Text]
    least: int
    most: int | None = None


def grow(draft: Draft, size: Callable[[Text], int], length: int) -> Text:
    """The text of a draft with as many units as fit; see the module's docstring.

    Args:
        draft: what to build; its least units must fit.
        size: tokens of a text.
        length: L, tokens.

    Raises:
        UserError: size does not grow with the text, or all units together are too short.
    """
    fits, best = draft.least, draft.build(draft.least)
    fits_size = size(best)
    near = length - length // _NEAR
    slope_from = (fits, fits_size)
    fails: tuple[int, int] | None = None
    guess = 2 * fits + 16
    tries = 0
    while fits_size <= near and (fails is None or fails[0] > fits + 1) and fits != draft.most:
        top = fails[0] - 1 if fails else draft.most
        guess = max(fits + 1, guess if top is None else min(guess, top))
        text = draft.build(guess)
        tokens = size(text)
        if tokens <= length:
            if tokens <= fits_size and guess >= fits + 16:
                raise UserError(f"num_tokens does not grow with the text: it counts {tokens} tokens again")
            slope_from = (fits, fits_size) if fails is None else fails
            fits, best, fits_size = guess, text, tokens
        else:
            fails = slope_from = (guess, tokens)
        tries += 1
        if fails and tries > _SLOW and tries % 2:
            guess = (fits + fails[0]) // 2
            continue
        slope = max((slope_from[1] - fits_size) / (slope_from[0] - fits), 1e-3)
        guess = fits + int(((near + length) / 2 - fits_size) / slope)
        guess = min(guess, 100 * (fits + 1))  # a slope measured on little text may be far off
    if fits == draft.most and fits_size < 0.97 * length:
        raise UserError(f"length {length} is too great: this task has names for no more than {fits_size} tokens")
    return best


def noise(count: int) -> list[str]:
    """The first `count` sentences of the endless noise."""
    return [NOISE[i % len(NOISE)] for i in range(count)]


def scatter(hay: Sequence[str], needles: Sequence[tuple[float, str]], between: str) -> tuple[str, tuple[int, ...]]:
    """Put needles between the pieces of a haystack.

    Args:
        hay: pieces.
        needles: (depth from 0 to below 1, text); needles of one gap stand in the order of their depths.
        between: what joins all of them.

    Returns:
        The text, and for each needle, as given, how many characters stand before it.
    """
    pieces: list[str] = []
    order = sorted(range(len(needles)), key=lambda i: needles[i][0])
    index: dict[int, int] = {}
    done = 0
    for i in order:
        gap = int(needles[i][0] * (len(hay) + 1))
        pieces += hay[done:gap]
        done = gap
        index[len(pieces)] = i
        pieces.append(needles[i][1])
    pieces += hay[done:]
    positions = [0] * len(needles)
    at = 0
    for number, piece in enumerate(pieces):
        if number in index:
            positions[index[number]] = at
        at += len(piece) + len(between)
    return between.join(pieces), tuple(positions)


class Sentences:
    """Natural text.

    Args:
        sentences: in the order of the text; spaces are made single, empty ones are dropped.

    Attributes:
        lowered: all of the text in lower case.

    Raises:
        UserError: fewer than MIN_SENTENCES different sentences.
    """

    def __init__(self, sentences: Sequence[str]) -> None:
        if isinstance(sentences, str):
            raise UserError("filler must be a list of sentences, not one text")
        split = [sentence.split() for sentence in sentences]
        self._words = [words for words in split if words]
        self._joined = [" ".join(words) for words in self._words]
        different = len(set(self._joined))
        if different < MIN_SENTENCES:
            raise UserError(
                f"filler has {different} different sentences, natural text needs at least {MIN_SENTENCES}"
            )
        self.lowered = " ".join(self._joined).lower()

    def __len__(self) -> int:
        return len(self._joined)

    def read(self, start: int, words: int) -> list[str]:
        """Sentences from number `start` on, of so many words together; dots stand where the last is cut off."""
        taken, left, i = [], words, start % len(self)
        while left > 0:
            cut = len(self._words[i]) > left
            taken.append(" ".join([*self._words[i][:left], "..."]) if cut else self._joined[i])
            left -= len(self._words[i])
            i = (i + 1) % len(self)
        return taken


# A triple-quoted string; what stands before it on its line tells a docstring from the value of an expression.
_STRING = re.compile(r'^(?P<before>[^\n"\'#]*?)[rRuU]?(?P<quote>"""|\'\'\')(?P<text>.*?)(?P=quote)', re.M | re.S)
_PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()-]*[a-z)][.?!]")


def prose(docstring: str) -> list[str]:
    """Sentences of a docstring that are plain English: four words or more, and no sign of code in them."""
    found = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z])", " ".join(paragraph.split())):
            if _PROSE.fullmatch(sentence) and 4 <= len(sentence.split()) <= 60:
                found.append(sentence)
    return found


@cache
def standard_sentences() -> Sentences:
    """Sentences of the docstrings of this Python's standard library, each once, file after file.

    Raises:
        UserError: the library's sources are not there.
    """
    found: dict[str, None] = {}  # a set that keeps the order
    sources, skipped = find_files(None)
    for _, text in read_texts(sources, skipped):
        for match in _STRING.finditer(text.decode("utf-8")):
            if not match["before"].strip():
                found.update(dict.fromkeys(prose(match["text"])))
    return Sentences(list(found))
