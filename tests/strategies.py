"""Random cases for hypothesis."""

from __future__ import annotations

from helpers import Case
from hypothesis import strategies as st


@st.composite
def cases(draw: st.DrawFn, packed: bool | None = None, max_length: int = 70) -> Case:
    """Cases of odd lengths, head counts and dims, small enough for a token loop."""
    is_packed = draw(st.booleans()) if packed is None else packed
    length = st.integers(0 if is_packed else 1, max_length)
    if is_packed:
        lengths = tuple(draw(st.lists(length, min_size=1, max_size=4)))
    else:
        lengths = (draw(length),) * draw(st.integers(1, 2))
    Hk = draw(st.integers(1, 3))
    return Case(
        lengths=lengths,
        H=Hk * draw(st.integers(1, 3)),
        Hk=Hk,
        D=draw(st.integers(1, 20)),
        V=draw(st.integers(1, 20)),
        packed=is_packed,
        alpha=draw(st.booleans()),
        beta=draw(st.booleans()),
        state=draw(st.booleans()),
        normalize_qk=draw(st.booleans()),
    )
