"""16-bit inputs with the default, refined solver against the exact float64 solve, on four input families."""

from __future__ import annotations

import pytest
from families import FAMILIES, family_inputs, gradients_of, with_gates
from helpers import assert_close, doubled, run


@pytest.mark.parametrize("random", [False, True], ids=["gates 1", "gates random"])
@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_against_exact(name: str, random: bool) -> None:
    inputs = with_gates(family_inputs(FAMILIES[name]), random)
    out, exact = run(inputs), run(doubled(inputs), solver_steps=(200,))
    assert_close({"o": out["o"]}, {"o": exact["o"]}, 2e-3, name)
    assert len(gradients_of(out)) == 12
    assert_close(gradients_of(out), gradients_of(exact), 4e-3, name)
