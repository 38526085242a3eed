"""Facts that stand in exactly one passage of a collection of real files.

    kind        subject                        question asks for                       answer stands in
    default     argument of a function         the literal that it defaults to         the signature
    returns     function                       its return annotation; without          the signature; the
                                               annotations the literal it returns      last statement
    base        class with one base            its base class                          the class's first line
    constant    name of a module               the literal that it is bound to         the assignment
    file        function or class              the file that defines it                the passage's header

Facts are read from the syntax trees of Python sources; no source is run. A function is one of a module or of a
class of a module, public or `__init__`. "The literal it returns": its only `return` is its last statement.

An answer is one line of source, as it stands there, of at most 8 words and 60 bytes. None, True, False and object
are left out, for they can be guessed, and so is what has no letter or digit, for the scores drop punctuation.

A fact is kept if, in the whole collection,

  - its file binds the subject's name once: no second definition, import, assignment, `del` or `global`;
  - the name is not bound from elsewhere, as in `module.NAME = 1` or `Class.method = f`;
  - its evidence, from the first word of the definition to the answer, stands whole in one passage;
  - no other passage spells it: f(... x=...) or X(Base) in the same file, module.f(... x=...) in any, NAME = ...
    in the same file, or the name at all in a file that is no Python source (documentation may give the answer);
  - for `file`: the name is defined once in all the files, and occurs as a word in this one passage only.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .examples import normalised
from .passages import DEFINITIONS, Definition, Document, Passage

KINDS = ("default", "returns", "base", "constant", "file")
ANSWER_BYTES, ANSWER_WORDS = 60, 8
GUESSED = frozenset({"none", "true", "false", "object"})
_CALL = re.compile(r"(def |class )?(?:(\w+)\.)?\b(\w+)\(([^()]*)\)")
_KEYWORD = re.compile(r"(\w+)\s*(?::[^,=]*)?=(?!=)")
_Span = tuple[int, int]


class Fact(NamedTuple):
    """A question that one passage of a collection answers.

    Attributes:
        kind: one of KINDS.
        subject: what is asked about, unique in the collection, e.g. "a/b.py: Class.method(argument)".
        question: in English, ends with a question mark.
        answer: as it stands in the passage.
        passage: number of the passage in the collection.
        start, end: the answer is text[start:end] of that passage, in characters.
        words: what the question names: the argument of a default, else the parts of the name in lower case.
    """

    kind: str
    subject: str
    question: str
    answer: str
    passage: int
    start: int
    end: int
    words: tuple[str, ...]


class Candidate(NamedTuple):
    """What may become a fact: a definition and where it gives the answer, in places of its file."""

    kind: str
    name: str  # dotted within the file: NAME, function, Class, Class.method
    argument: str  # of a default, else ""
    question: str
    answer: str
    place: _Span
    evidence: _Span


class Names:
    """What the files of a collection bind and define, counted."""

    def __init__(self) -> None:
        self.bound: Counter[tuple[str, str]] = Counter()  # (file, dotted name)
        self.defined: Counter[str] = Counter()  # functions and classes at any depth
        self.assigned: set[tuple[str, str]] = set()  # owner.name = ... and del owner.name, anywhere

    def add(self, document: Document) -> None:
        """Count what a document binds, unless it has no syntax tree."""
        if document.tree is None:
            return
        self._bind(document.name, "", document.tree.body)
        for node in document.tree.body:
            if isinstance(node, ast.ClassDef):
                self._bind(document.name, f"{node.name}.", node.body)
        for inner in ast.walk(document.tree):
            if isinstance(inner, DEFINITIONS):
                self.defined[inner.name] += 1
            elif isinstance(inner, ast.Global):
                self.bound.update((document.name, name) for name in inner.names)
            elif isinstance(inner, ast.Attribute) and not isinstance(inner.ctx, ast.Load):
                owner = inner.value
                if isinstance(owner, ast.Name | ast.Attribute):
                    self.assigned.add((owner.id if isinstance(owner, ast.Name) else owner.attr, inner.attr))

    def _bind(self, file: str, prefix: str, body: Sequence[ast.stmt]) -> None:
        """Count the bindings of one scope; names of comprehensions, which are none, count too, to be sure."""
        left: list[ast.AST] = list(body)
        while left:
            node = left.pop()
            found: str | None = None
            if isinstance(node, DEFINITIONS):
                found = node.name
                left += node.decorator_list
            elif isinstance(node, ast.Name):
                found = None if isinstance(node.ctx, ast.Load) else node.id
            elif isinstance(node, ast.alias):
                found = (node.asname or node.name).split(".")[0]
            elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
                found = node.name
            elif isinstance(node, ast.MatchMapping):
                found = node.rest
            if found is not None:
                self.bound[file, prefix + found] += 1
            if not isinstance(node, DEFINITIONS):
                left += ast.iter_child_nodes(node)


def candidates(document: Document) -> Iterator[Candidate]:
    """Read what may be asked of a document, in the order of its source."""
    for node in document.tree.body if document.tree else ():
        if isinstance(node, ast.ClassDef) and _public(node.name):
            yield from _of_class(document, node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _public(node.name):
            yield from _of_function(document, node, "")
            yield from _file_of(document, node)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value and _literal(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            target = targets[0]
            if len(targets) == 1 and isinstance(target, ast.Name) and _public(target.id):
                question = f"In {document.name}, what is the value of the constant {target.id}?"
                yield from _candidate(document, "constant", target.id, "", question, node, node.value)


def facts_of(
    passages: Sequence[Passage], found: Sequence[tuple[str, Sequence[Candidate]]], names: Names, python: set[str]
) -> list[Fact]:
    """Keep the candidates that stand in exactly one passage.

    Args:
        passages: of the whole collection.
        found: name of each file and its candidates.
        names: what all the files bind.
        python: names of the files that have a syntax tree.
    """
    of_file: dict[str, list[int]] = {}
    for number, passage in enumerate(passages):
        of_file.setdefault(passage.file, []).append(number)
    asked = {candidate.name.split(".")[-1] for _, some in found for candidate in some}
    occurs: Counter[str] = Counter()
    in_text: set[str] = set()
    for passage in passages:
        words = asked.intersection(re.findall(r"\w+", passage.text))
        occurs.update(words)
        if passage.file not in python:
            in_text |= words
    spelled = _spelled(passages)

    kept = []
    for file, some in found:
        for candidate in some:
            parents, _, name = candidate.name.rpartition(".")
            owner = parents or re.sub(r"(/__init__)?\.pyi?$", "", file).split("/")[-1]
            home = _home(passages, of_file.get(file, ()), candidate.evidence)
            if home is None or name in in_text or (owner, name) in names.assigned:
                continue
            if any(names.bound[file, bound] != 1 for bound in (candidate.name, parents) if bound):
                continue
            if candidate.kind == "file" and (names.defined[name] != 1 or occurs[name] != 1):
                continue
            if _elsewhere(passages, of_file[file], home, candidate, name, owner, spelled):
                continue
            kept.append(_fact(candidate, home, passages[home]))
    return kept


def _fact(candidate: Candidate, number: int, passage: Passage) -> Fact:
    name = candidate.name.split(".")[-1]
    subject = f"{passage.file}: {candidate.name}" + (f"({candidate.argument})" if candidate.argument else "")
    words = (candidate.argument,) if candidate.argument else parts_of(name)
    shift = passage.shift
    if candidate.kind == "file":
        subject, shift = f"file of {name}", len("# File: ")  # the place is one of the header
    start, end = (place + shift for place in candidate.place)
    return Fact(candidate.kind, subject, candidate.question, candidate.answer, number, start, end, words)


def parts_of(name: str) -> tuple[str, ...]:
    """Parts of a name of three letters or more, in lower case, e.g. ("http", "server") of HTTPServer."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return tuple(sorted({part.lower() for part in parts if len(part) > 2}))


def _of_class(document: Document, node: ast.ClassDef) -> Iterator[Candidate]:
    if len(node.bases) == 1 and isinstance(node.bases[0], ast.Name | ast.Attribute):
        question = f"In {document.name}, which class does the class {node.name} inherit from?"
        yield from _candidate(document, "base", node.name, "", question, node, node.bases[0])
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
            if _public(inner.name) or inner.name == "__init__":
                yield from _of_function(document, inner, f"{node.name}.")
    yield from _file_of(document, node)


def _of_function(
    document: Document, node: ast.FunctionDef | ast.AsyncFunctionDef, prefix: str
) -> Iterator[Candidate]:
    name = prefix + node.name
    what = f"the {'method' if prefix else 'function'} {name}"
    positional = [*node.args.posonlyargs, *node.args.args]
    pairs: list[tuple[ast.arg, ast.expr | None]] = []
    pairs += zip(positional[len(positional) - len(node.args.defaults) :], node.args.defaults, strict=True)
    pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    for argument, default in pairs:
        if default and _literal(default) and _public(argument.arg):
            question = f"In {document.name}, what is the default value of the argument {argument.arg} of {what}?"
            yield from _candidate(document, "default", name, argument.arg, question, node, default)
    annotated = [argument for argument in (*positional, *node.args.kwonlyargs) if argument.annotation]
    if node.returns:
        question = f"In {document.name}, which type is {what} annotated to return?"
        yield from _candidate(document, "returns", name, "", question, node, node.returns)
    elif not annotated and (value := _only_return(node)):
        question = f"In {document.name}, which value does {what} return?"
        yield from _candidate(document, "returns", name, "", question, node, value)


def _file_of(document: Document, node: Definition) -> Iterator[Candidate]:
    what = "class" if isinstance(node, ast.ClassDef) else "function"
    question = f"Which file defines the {what} {node.name}?"
    start = document.span(node)[0]
    evidence = start, start + len("async def ") + len(node.name)
    if _short(document.name):
        place = 0, len(document.name)
        yield Candidate("file", node.name, "", question, document.name, place, evidence)


def _candidate(
    document: Document, kind: str, name: str, argument: str, question: str, node: ast.stmt, value: ast.expr
) -> Iterator[Candidate]:
    place = document.span(value)
    answer = document.text[slice(*place)]
    if _short(answer):
        yield Candidate(kind, name, argument, question, answer, place, (document.span(node)[0], place[1]))


def _public(name: str) -> bool:
    return not name.startswith("_")


def _short(answer: str) -> bool:
    plain = normalised(answer)
    return (
        "\n" not in answer
        and len(answer.encode()) <= ANSWER_BYTES
        and len(answer.split()) <= ANSWER_WORDS
        and plain not in GUESSED
        and re.search(r"[^\W_]", plain) is not None
    )


def _literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def _only_return(node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.expr | None:
    """The literal that a function returns: its only return is its last statement, and it yields nothing."""
    last = node.body[-1]
    if not (isinstance(last, ast.Return) and last.value and _literal(last.value)):
        return None
    left: list[ast.AST] = list(node.body[:-1])
    while left:
        inner = left.pop()
        if isinstance(inner, ast.Return | ast.Yield | ast.YieldFrom):
            return None
        if not isinstance(inner, (*DEFINITIONS, ast.Lambda)):
            left += ast.iter_child_nodes(inner)
    return last.value


def _home(passages: Sequence[Passage], numbers: Sequence[int], evidence: _Span) -> int | None:
    """Number of the passage that holds the whole evidence."""
    for number in numbers:
        if passages[number].start <= evidence[0] and evidence[1] <= passages[number].end:
            return number
    return None


def _spelled(passages: Sequence[Passage]) -> dict[tuple[str, str], list[tuple[str, int]]]:
    """Calls that the text spells, in code, comments and docstrings, where no parentheses are within theirs.

    Returns:
        For (name, keyword) and (name, all that stands in the parentheses): owner or "", passage.
    """
    calls: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for number, passage in enumerate(passages):
        for define, owner, name, inside in _CALL.findall(passage.text):
            if not define:
                for token in {*_KEYWORD.findall(inside), inside.strip()}:
                    calls.setdefault((name, token), []).append((owner, number))
    return calls


def _elsewhere(
    passages: Sequence[Passage],
    same_file: Sequence[int],
    home: int,
    candidate: Candidate,
    name: str,
    owner: str,
    spelled: dict[tuple[str, str], list[tuple[str, int]]],
) -> bool:
    """Whether another passage spells what is asked."""
    if candidate.kind == "constant":
        bound = re.compile(rf"(?<![\w.]){re.escape(name)}\s*=(?!=)")
        return any(number != home and bound.search(passages[number].text) for number in same_file)
    token = candidate.argument if candidate.kind == "default" else candidate.answer
    called = {name, owner} if name == "__init__" else {name}
    for call in called if candidate.kind in ("default", "base") else ():
        for spelled_owner, number in spelled.get((call, token), ()):
            if number != home and (spelled_owner == owner or passages[number].file == passages[home].file):
                return True
    return False
