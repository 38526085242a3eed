"""Questions about long real text: LongQA, one long document, and RAG, numbered passages.

Both ask for a fact that stands in exactly one passage of a collection (experiments/tasks/facts.py). HELMET (arXiv
2410.02694) has tasks of the same two forms; texts, questions and answers here come from the files that are read.

    long_qa     consecutive passages, file after file (from the last to the first again), around the gold one,
                whose depth is uniform; the first and the last passage are cut so that the length is met
    rag         passages [1] [2] ... in random order, the gold one among distractors. Every fourth distractor is
                a near one, as long as there are any; a distractor, the last one drawn, is cut to meet the length

A passage is near to a fact if it shares a word with the question where it matters. For defaults it gives a value
to an argument of the same name, in a definition or a call; else it defines a function, class or name, of the sort
that is asked about, that has a part of its name in common. rag asks for no fact without a near passage.

No fact is asked twice before all were asked once. Kinds take turns as long as they last, and within a kind the
answers do; of facts with the same kind and answer at most SAME_ANSWER are asked, so that no guess is often right.

Legend: L tokens of the prompt and the room for the answer, ANSWER_TOKENS.

    prompt   what to do, blank line, text, blank line, "Question: ...?", new line, "Answer:"
    answer   " " + answer, then a line end: what a model is trained to go on with

Scores: exact_match and f1 of experiments.tasks.examples.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Literal, get_args

from gka.training.errors import UserError

from .collection import Collection, Part, Split
from .examples import Example, normalised
from .facts import KINDS, Fact, parts_of
from .passages import Passage

Task = Literal["long_qa", "rag"]
ANSWER_TOKENS = 64  # an answer has at most 60 bytes, and no tokenizer needs more tokens than bytes
NEAR_EVERY = 4
SAME_ANSWER = 5
_DEFINED = {  # a name that a passage defines, by the kind of facts that ask for such
    "default": re.compile(r"(?<=[(,\s])(\w+)(?:\s*:[^,=()\n]*)?=(?=[^=\n]*[,)])"),
    "returns": re.compile(r"\bdef (\w+)"),
    "base": re.compile(r"\bclass (\w+) ?\("),
    "constant": re.compile(r"^(\w+)\b *(?::[^=\n]*)?=(?!=)", re.MULTILINE),
    "file": re.compile(r"^(?:async def|def|class) (\w+)", re.MULTILINE),
}
_INSTRUCTIONS: dict[str, str] = {
    "long_qa": "Here is a document made of files. Answer the question that follows it in a few words, "
    "exactly as they stand in the document.",
    "rag": "Here are numbered passages of files. Only one of them answers the question that follows them. "
    "Answer in a few words, exactly as they stand in that passage.",
}


def make_long_qa(
    collection: Collection,
    *,
    task: Task,
    length: int,
    count: int,
    seed: int,
    split: Split,
    num_tokens: Callable[[str], int],
) -> list[Example]:
    """Make examples of long question answering; the same arguments give the same examples.

    Args:
        collection: what to ask about, from Collection.read.
        task: "long_qa" for one document, "rag" for numbered passages.
        length: L. Prompt and ANSWER_TOKENS together have at most so many tokens, and less by at most
            2 % of L and 100 tokens.
        count: number of examples, not negative. With more than there are facts, facts come again, each time
            in another prompt.
        seed: of what is asked, of the depths and of the distractors.
        split: "train" or "test": text and facts come from the files of this part alone.
        num_tokens: number of tokens of a text. It is called once for each passage that is used and some
            times for each prompt.

    Returns:
        Examples with one answer each, as it stands in the gold passage, and one depth: the answer begins
        at character depth * len(prompt).

    Raises:
        UserError: an argument is out of its range, the part of the collection has too little text or no
            facts, or no passage with a fact fits the length.
    """
    for name, value, choices in (("task", task, get_args(Task)), ("split", split, get_args(Split))):
        if value not in choices:
            raise UserError(f"{name} must be {' or '.join(choices)}, got {value}")
    if count < 0:
        raise UserError(f"count must not be negative, got {count}")
    part = collection.part(split)
    if not part.facts:
        raise UserError(f"{part}: give it more Python sources, or another test_fraction")
    rng = random.Random(f"{task} {split} {seed}")
    near = Near(part) if task == "rag" else None
    facts = [fact for fact in in_turn(part.facts, rng) if near is None or near.passages(fact)]
    if not facts:
        raise UserError(f"{part}, none of which has a near distractor: give it more Python sources")
    prompts = _Prompts(part, task, length - ANSWER_TOKENS, num_tokens)
    wanted = prompts.that_fit(facts)
    return [prompts.example(next(wanted), near, rng) for _ in range(count)]


class Near:
    """Which passages of a part are near to a fact: its index is of the words of what each passage defines."""

    def __init__(self, part: Part) -> None:
        self._passages: dict[tuple[str, str], set[int]] = {}
        for number, passage in enumerate(part.passages):
            for kind, pattern in _DEFINED.items():
                for name in set(pattern.findall(passage.body)):
                    for word in (name,) if kind == "default" else parts_of(name):
                        self._passages.setdefault((kind, word), set()).add(number)

    def passages(self, fact: Fact) -> list[int]:
        """Numbers of the passages near to a fact, in order, without its own."""
        found = set[int]().union(*(self._passages.get((fact.kind, word), set()) for word in fact.words))
        return sorted(found - {fact.passage})


def in_turn(facts: Sequence[Fact], rng: random.Random) -> list[Fact]:
    """Facts in the order in which they are asked: random, but kinds take turns, and so do a kind's answers."""
    by_kind = []
    for kind in KINDS:
        answers: dict[str, list[Fact]] = {}
        for fact in facts:
            if fact.kind == kind:
                answers.setdefault(normalised(fact.answer), []).append(fact)
        groups = [rng.sample(group, min(len(group), SAME_ANSWER)) for group in answers.values()]
        rng.shuffle(groups)
        by_kind.append(_turns(groups))
    return _turns(by_kind)


def _turns(groups: Sequence[Sequence[Fact]]) -> list[Fact]:
    """The first of each group, then the second of each, ..."""
    return [fact for turn in zip_longest(*groups) for fact in turn if fact is not None]


class _Prompts:
    """Prompts from one part of a collection, of at most `limit` tokens each."""

    def __init__(self, part: Part, task: Task, limit: int, num_tokens: Callable[[str], int]) -> None:
        self.part, self.task, self.limit, self.num_tokens = part, task, limit, num_tokens
        self._between = num_tokens("\n\n" if task == "long_qa" else "\n\n[100] ")
        self._counted: dict[int, int] = {}

    def tokens(self, number: int) -> int:
        """Tokens of a passage and what stands between it and the next."""
        if number not in self._counted:
            self._counted[number] = self.num_tokens(self.part.passages[number].text) + self._between
        return self._counted[number]

    def frame(self, fact: Fact) -> tuple[str, str]:
        """What stands before and after the passages."""
        return f"{_INSTRUCTIONS[self.task]}\n\n", f"\n\nQuestion: {fact.question}\nAnswer:"

    def that_fit(self, facts: Sequence[Fact]) -> Iterator[Fact]:
        """Facts whose passage takes at most half of what is there for passages, again and again."""
        shortest, fitted = math.inf, True
        while fitted:
            fitted = False
            for fact in facts:
                frame, gold = self.num_tokens("".join(self.frame(fact))), self.tokens(fact.passage)
                if frame + 2 * gold <= self.limit:
                    fitted = True
                    yield fact
                else:
                    shortest = min(shortest, frame + 2 * gold)
        raise UserError(f"no question fits: length must be at least {shortest + ANSWER_TOKENS}")

    def example(self, fact: Fact, near: Near | None, rng: random.Random) -> Example:
        """Build the prompt that asks for a fact.

        Passages are counted once each. The sum differs from the count of the prompt where tokens span
        their borders, so the prompt is counted, too, and built anew with what it had too many or too few.
        """
        start, end = self.frame(fact)
        build = self._document(fact, rng) if near is None else self._numbered(fact, near, rng)
        tolerance, frame = self.limit // 50 + 100, self.num_tokens(start + end)
        budget, best, best_tokens, last, tokens = self.limit - frame, "", 0, "", 0
        for _ in range(10):
            texts, gold = build(budget)
            prompt = start + "\n\n".join(texts) + end
            if prompt != last:
                last, tokens = prompt, self.num_tokens(prompt)
            if best_tokens < tokens <= self.limit:
                best, best_tokens = prompt, tokens
                place = len(start) + sum(len(text) + 2 for text in texts[:gold]) + len(texts[gold])
                place -= len(self.part.passages[fact.passage].text) - fact.start
                if tokens >= self.limit - 32:
                    break
            budget += self.limit - tokens - 8
        if best_tokens < self.limit - tolerance:
            length = self.limit + ANSWER_TOKENS
            raise UserError(f"{self.part}: too little for a length of {length:,} tokens; give it more files")
        return Example(best, (fact.answer,), (place / len(best),))

    def _document(self, fact: Fact, rng: random.Random) -> Callable[[int], tuple[list[str], int]]:
        """How to build the passages around the gold one for a budget of tokens: texts, number of the gold one."""
        depth, many = rng.random(), len(self.part.passages)

        def build(budget: int) -> tuple[list[str], int]:
            room = budget - self.tokens(fact.passage)
            back = ((fact.passage - step) % many for step in range(1, many))
            before, left = self._take(back, int(depth * room), tail=True)
            ahead = ((fact.passage + step) % many for step in range(1, many - len(before)))
            after, _ = self._take(ahead, room - int(depth * room) + left)
            return [*before[::-1], self.part.passages[fact.passage].text, *after], len(before)

        return build

    def _numbered(self, fact: Fact, near: Near, rng: random.Random) -> Callable[[int], tuple[list[str], int]]:
        """How to build the numbered passages, the gold one among them, for a budget of tokens: as _document."""
        close = near.passages(fact)
        rng.shuffle(close)
        known = {fact.passage, *close}
        others = [number for number in range(len(self.part.passages)) if number not in known]
        rng.shuffle(others)
        drawn: list[int] = []
        while close or others:
            source = close if close and (len(drawn) % NEAR_EVERY == 0 or not others) else others
            drawn.append(source.pop())
        keys = [rng.random() for _ in range(len(drawn) + 1)]  # where in the order; the last is the gold one's

        def build(budget: int) -> tuple[list[str], int]:
            texts, _ = self._take(drawn, budget - self.tokens(fact.passage))
            placed = sorted(
                zip([*keys[: len(texts)], keys[-1]], [*texts, None], strict=True), key=lambda pair: pair[0]
            )
            gold = next(place for place, (_, text) in enumerate(placed) if text is None)
            whole = self.part.passages[fact.passage].text
            return [f"[{n}] {whole if text is None else text}" for n, (_, text) in enumerate(placed, 1)], gold

        return build

    def _take(self, numbers: Iterable[int], room: int, tail: bool = False) -> tuple[list[str], int]:
        """Texts of passages as long as there is room, the last one cut; and the tokens that are left."""
        texts = []
        for number in numbers:
            passage, tokens = self.part.passages[number], self.tokens(number)
            if tokens > room:
                share = max(0, room - self._between) / tokens
                kept = shortened(passage, int(share * len(passage.text)), tail)
                if kept:
                    texts.append(kept)
                    room -= self._between + round(tokens * len(kept) / len(passage.text))
                break
            texts.append(passage.text)
            room -= tokens
        return texts, max(room, 0)


def shortened(passage: Passage, chars: int, tail: bool = False) -> str:
    """The header and the first (or last) lines of a passage, about `chars` characters; "" if that is too few.

    The cut is at a line end if one is near.
    """
    header = passage.text[: -len(passage.body)]
    chars -= len(header)
    if chars < 1:
        return ""
    body, near = passage.body, min(100, chars // 4)
    if tail:
        at = len(body) - chars
        line = body.find("\n", at, at + near) + 1
        return header + body[line or at :]
    line = body.rfind("\n", chars - near, chars)
    return header + body[: line if line > 0 else chars]
