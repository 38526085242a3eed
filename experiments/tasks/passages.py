"""Text files cut into passages, each headed by the name of its file.

    # File: email/mime/text.py                          a passage that starts between definitions
    # File: email/mime/text.py, inside MIMEText         one that starts within a definition

A Python source is cut where a statement of the module ends. One that is longer than a passage is cut where the
statements in it end, and so on inwards; a single statement that is too long, at the end of a line. Consecutive
pieces are joined as long as they fit. Other text is cut between paragraphs, else at the end of a line.

The body of a passage is a slice of its file's text, so that places in the one can be told in the other.
"""

from __future__ import annotations

import ast
import re
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from gka.training.errors import UserError

PASSAGE_CHARS = 2000  # some 500 tokens of a language model: 8K tokens hold sixteen passages
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Passage(NamedTuple):
    """A piece of a file.

    Attributes:
        file: name of the file, relative to the folder that was read, with slashes.
        text: header line, then the body.
        start, end: the body is text[start:end] of the file, in characters.
    """

    file: str
    text: str
    start: int
    end: int

    @property
    def body(self) -> str:
        return self.text[self.shift + self.start :]

    @property
    def shift(self) -> int:
        """What to add to a place in the file to have the place in `text`."""
        return len(self.text) - self.end


class Document:
    """A file's text, with its syntax tree if it is a Python source that this Python can parse.

    Args:
        name: of the file, relative to its folder.
        raw: its bytes, UTF-8. Line ends become \\n; a byte order mark is left out.
    """

    def __init__(self, name: str, raw: bytes) -> None:
        self.name = name
        self.text = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        self.tree = _parse(self.text) if name.endswith((".py", ".pyi")) else None
        self._lines = self.text.split("\n") if self.tree else []
        self._starts = [0, *accumulate(len(line) + 1 for line in self._lines)]

    def place(self, line: int, column: int) -> int:
        """Place in the text, in characters, of a line (from 1) and column (in bytes), as `ast` gives them."""
        return self._starts[line - 1] + len(self._lines[line - 1].encode()[:column].decode())

    def span(self, node: ast.stmt | ast.expr) -> tuple[int, int]:
        """First place of a node and the one after its last; of a definition without its decorators."""
        assert node.end_lineno is not None and node.end_col_offset is not None  # ast.parse sets them
        return self.place(node.lineno, node.col_offset), self.place(node.end_lineno, node.end_col_offset)

    def line_end(self, node: ast.stmt) -> int:
        """The place after the line end that follows a statement."""
        assert node.end_lineno is not None
        return min(self._starts[node.end_lineno], len(self.text))

    def scope(self, place: int) -> str:
        """Dotted name of the innermost definition that begins before a place and ends after it, or ''."""
        names: list[str] = []
        inside = self.tree.body if self.tree else []
        while inside:
            line = bisect_right(self._starts, place)
            node = next((node for node in inside if node.lineno <= line <= (node.end_lineno or 0)), None)
            if node is None or not self.span(node)[0] < place:
                break
            if isinstance(node, DEFINITIONS):
                names.append(node.name)
            inside = _children(node)
        return ".".join(names)


def cut(document: Document, passage_chars: int = PASSAGE_CHARS) -> list[Passage]:
    """Cut a document into passages, in order, that leave out nothing but blank lines between them.

    Args:
        document: what to cut.
        passage_chars: at most so many characters of the file stand in a passage.

    Raises:
        UserError: passage_chars is below 100.
    """
    if passage_chars < 100:
        raise UserError(f"passage_chars must be at least 100, got {passage_chars}")
    text, passages = document.text, []
    if document.tree:
        pieces = list(_pieces(document, document.tree.body, 0, len(text), passage_chars))
    else:
        ends = [match.end() for match in re.finditer(r"\n[ \t]*\n+", text)]
        whole = zip([0, *ends], [*ends, len(text)], strict=True)
        pieces = [piece for start, end in whole for piece in _by_lines(text, start, end, passage_chars)]
    for first, last in _joined(pieces, passage_chars):
        body = text[first:last].rstrip()
        lead = re.match(r"(?:[ \t\f]*\n)*", body)
        start, end = first + (lead.end() if lead else 0), first + len(body)
        if end > start:
            scope = document.scope(start)
            header = f"# File: {document.name}" + (f", inside {scope}" if scope else "")
            passages.append(Passage(document.name, f"{header}\n{text[start:end]}", start, end))
    return passages


def _parse(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a source's doubtful escapes are no concern of ours
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # not of this Python, or too deeply nested
        return None


def _children(node: ast.AST) -> list[ast.stmt]:
    """Statements right below a node, in the order of the source."""
    found: list[ast.stmt] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            found.append(child)
        elif isinstance(child, ast.ExceptHandler | ast.match_case):
            found += _children(child)
    return found


def _pieces(
    document: Document, statements: Sequence[ast.stmt], start: int, end: int, limit: int
) -> Iterator[tuple[int, int]]:
    """Cut text[start:end], which holds the statements, into pieces of at most `limit` characters."""
    for number, statement in enumerate(statements):
        stop = end if number + 1 == len(statements) else document.line_end(statement)
        if stop <= start:  # it shares a line with the one before
            continue
        inner = _children(statement)
        if stop - start > limit and inner:
            yield from _pieces(document, inner, start, stop, limit)
        else:
            yield from _by_lines(document.text, start, stop, limit)
        start = stop
    if start < end:
        yield from _by_lines(document.text, start, end, limit)


def _by_lines(text: str, start: int, end: int, limit: int) -> Iterator[tuple[int, int]]:
    while end - start > limit:
        stop = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield start, stop
        start = stop
    if start < end:
        yield start, end


def _joined(pieces: Sequence[tuple[int, int]], limit: int) -> Iterator[tuple[int, int]]:
    first, last = 0, 0
    for start, end in pieces:
        if end - first > limit and last > first:
            yield first, last
            first = start
        last = end
    if last > first:
        yield first, last
