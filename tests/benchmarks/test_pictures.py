"""The pictures of the guides: the numbers drawn, and that they are drawn."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from pages import assert_drawn, rows_of

from benchmarks import pictures
from experiments.evidence.numerics import systems, token_inputs
from gka.ops.solvers import RIDGE_RATIO, node_steps

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    q, k, _, g = token_inputs(512, 64)
    return systems(q, k, g, every=64)


def test_pictures_show_something(tmp_path: Path) -> None:
    pictures.main(tmp_path)
    made = list(tmp_path.iterdir())
    assert len(made) >= 3
    for picture in made:
        assert_drawn(picture)


def test_the_layers_are_those_that_imports_are_checked_by() -> None:
    contract = re.search(r"^layers = (\[.*\])$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert contract is not None
    assert [name for name, *_ in pictures.LAYERS] == json.loads(contract[1])


def test_what_ranks_receive_is_that_of_the_page() -> None:
    """The table is for the same sizes; its last column has attention, its third the other layout."""
    rows = [row for row in rows_of((ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")) if len(row) == 4]
    found = {row[0]: (row[1], row[3]) for row in rows if row[0].replace(",", "").isdigit()}
    assert len(found) == 3
    for tokens, told in found.items():
        gka, attention = pictures.received_megabytes(int(tokens.replace(",", "")))
        assert told == (f"{gka:.1f}", f"{attention:,.0f}")


def test_a_state_that_fades_forgets_the_first_subject() -> None:
    k = pictures.keys_of_two_subjects()
    kept = {g: pictures.states(k, g, (64, 128)) for g in pictures.DECAYS}
    shares = {
        g: (late.diagonal()[:8].sum() / early.diagonal()[:8].sum()).item() for g, (early, late) in kept.items()
    }
    own = (64 * k[0, 64:, 0, :8].square().sum(1).mean()).item()  # what the second half brings to these channels
    assert shares[0.0] > 1 and 0.04 < shares[-0.05] < 0.04 + own / 10
    assert math.isclose(math.exp(-0.05 * 64), 0.04, rel_tol=0.05)


def test_the_spectrum_is_that_of_the_page(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    values = torch.linalg.eigvalsh(problem[0][-1])
    assert round((values[-1] / values[0]).item()) == 976
    assert values[0] > 0 and values[-1] <= 1
    assert (1 + RIDGE_RATIO) / RIDGE_RATIO == pytest.approx(51)


def test_the_errors_are_those_of_the_page(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    taus = node_steps(32, RIDGE_RATIO)
    in_order = pictures.errors_by_step(*problem, taus)
    assert max(in_order) < 1 and in_order[-1] < 3e-4
    assert 1e3 < pictures.errors_by_step(*problem, sorted(taus))[-1] < 1e5
    one, two = (pictures.errors_by_products(*problem, stages, (9, 41)) for stages in (1, 2))
    assert one[0] < two[0] and 5e-3 < one[1] < 1e-2 and two[1] < 2e-4
