"""What the long-context tasks have in common: an example, and how an answer is scored.

    exact match   1 if the normalised answer equals a normalised reference, else 0
    F1            2 p r / (p + r) of the words that answer and reference share, the best reference counts
    recall        share of the references that stand in the answer as whole words (RULER, arXiv 2404.06654, counts
                  parts of words, too)

Normalised is lower case without articles, repeated spaces and the punctuation around words (SQuAD, arXiv
1606.05250, section 6.1, drops all punctuation; here names like os.path stay whole).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Example(NamedTuple):
    """A prompt and what has to be answered.

    Attributes:
        prompt: all that the model reads, up to where its answer begins.
        answers: references. Whether one of them is enough or all are wanted is up to the task's score.
        depths: of what has to be found, where it stands in the prompt, from 0 (start) to 1 (end).
    """

    prompt: str
    answers: tuple[str, ...]
    depths: tuple[float, ...] = ()


def normalised(text: str) -> str:
    """Lower case, no articles, no punctuation around words, single spaces."""
    words = (word.strip("\"'`.,:;!?()[]{}<>*=") for word in text.lower().split())
    return " ".join(word for word in words if word and word not in ("a", "an", "the"))


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the answer is one of the references, else 0.0."""
    return float(normalised(answer) in {normalised(reference) for reference in references})


def f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, with the reference that gives most."""
    return max((_f1(_words(answer), _words(reference)) for reference in references), default=0.0)


def string_recall(answer: str, references: Sequence[str]) -> float:
    """Share of the references that the answer contains, whatever stands around them; 1.0 for none."""
    found = [re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", answer, re.IGNORECASE) for reference in references]
    return sum(map(bool, found)) / len(found) if found else 1.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", normalised(text))


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference))
