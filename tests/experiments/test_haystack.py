"""Prompts grow to their length, and needles and natural text stand where they should."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from experiments.tasks.haystack import Draft, Sentences, Text, grow, prose, scatter, standard_sentences


@given(
    costs=st.lists(st.integers(1, 60), min_size=40, max_size=400),
    least=st.integers(1, 20),
    spare=st.integers(0, 8000),
)
def test_grow_ends_near_the_length_or_where_one_unit_more_is_too_much(
    costs: list[int], least: int, spare: int
) -> None:
    def size(units: int) -> int:
        full, rest = divmod(units, len(costs))
        return 30 + full * sum(costs) + sum(costs[:rest])

    length = size(least) + spare
    text = grow(Draft(lambda n: Text(str(n), "", ()), least), lambda text: size(int(text.text)), length)
    units = int(text.text)
    assert units >= least and size(units) <= length
    assert size(units) > length - length / 500 or size(units + 1) > length


@given(st.lists(st.floats(0, 1, exclude_max=True), max_size=6), st.integers(0, 5))
def test_scatter_keeps_the_hay_in_order_and_tells_where_needles_are(depths: list[float], pieces: int) -> None:
    hay = [f"hay{i}" for i in range(pieces)]
    text, positions = scatter(hay, [(depth, f"needle{i}") for i, depth in enumerate(depths)], " ")
    words = text.split()
    assert [word for word in words if word.startswith("hay")] == hay and len(words) == pieces + len(depths)
    for i, depth in enumerate(depths):
        assert text[positions[i] :].startswith(f"needle{i}")
        before = [word for word in text[: positions[i]].split() if word.startswith("hay")]
        assert len(before) == int(depth * (pieces + 1))


def test_natural_text_is_prose_and_plenty() -> None:
    sentences = standard_sentences()
    assert len(sentences) > 3000 and len(sentences.lowered) > 200_000
    text = " ".join(sentences.read(0, 10_000))
    assert not re.search(r"[=_<>{}\\]|\bself\.", text)
    docstring = (
        "Return the sum of numbers.\n\n>>> add(1, 2)\n3\n\nIt is x_y = 3 here.  They are\nadded from the left."
    )
    assert prose(docstring) == ["Return the sum of numbers.", "They are added from the left."]


@given(st.integers(0, 200), st.integers(1, 500))
def test_natural_text_has_the_words_asked_for(start: int, words: int) -> None:
    sentences = Sentences([f"Number {i} is" + " so" * (i % 7) + " here." for i in range(80)])
    assert len(" ".join(sentences.read(start, words)).replace(" ...", "").split()) == words
