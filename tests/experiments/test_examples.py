"""Scores of answers: what counts as right."""

from __future__ import annotations

import pytest

from experiments.tasks.examples import exact_match, f1, normalised, string_recall


def test_normalised() -> None:
    assert normalised("  The Value is `os.path`,  (an int). ") == "value is os.path int"


@pytest.mark.parametrize(
    "answer, references, expected",
    [
        ("None.", ["None"], (1, 1)),
        ("the default", ["default", "x"], (1, 1)),
        ("b c d", ["c d e f"], (0, 4 / 7)),
        ("", ["x"], (0, 0)),
        ("x", [], (0, 0)),
        ("one two", ["three", "two"], (0, 2 / 3)),
        ("x x y", ["x y y"], (0, 2 / 3)),
        ("os.path.join", ["os.path"], (0, 4 / 5)),
    ],
)
def test_exact_match_and_f1(answer: str, references: list[str], expected: tuple[float, float]) -> None:
    assert (exact_match(answer, references), f1(answer, references)) == pytest.approx(expected)


def test_string_recall() -> None:
    assert string_recall("they are 12, 345 and Foo", ["12", "foo", "34"]) == pytest.approx(2 / 3)
    assert string_recall("x.y", ["x.y", "x?y"]) == 0.5
    assert string_recall("whatever", []) == 1.0
