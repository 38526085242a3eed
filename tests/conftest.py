"""Settings and fixtures of the whole suite."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "gka",
    deadline=None,
    max_examples=15,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("gka")


@pytest.fixture(scope="module")
def poisoned() -> Iterator[None]:
    """Uninitialised memory is filled with NaN, so an output that nothing wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
