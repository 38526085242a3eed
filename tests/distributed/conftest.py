"""The processes that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="package")
def ranks() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    started.close()
