"""Settings and fixtures of the whole suite."""

import gc
import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What torch.compile keeps on disk knows operators by name: with other arguments than now it would be wrong.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import importlib.util
import logging
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined: they run on the CPU
import quick_interpreter
from transformers.utils import logging as transformers_logging

if os.environ.get("TRITON_INTERPRET") == "1" and quick_interpreter.is_made_for_this():
    quick_interpreter.install()
torch.set_num_threads(1)
if importlib.util.find_spec("hypothesis"):  # tests on a GPU need nothing but pytest, torch and transformers
    import hypothesis

    hypothesis.settings.register_profile(
        "gka",
        deadline=None,
        max_examples=15,
        derandomize=True,
        print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("gka")


LOGGERS = [logging.getLogger(name) for name in ("torch", "accelerate", "transformers")]
LEVELS = [logger.level for logger in LOGGERS]


def pytest_collection_finish() -> None:
    """Leave what is imported out of garbage collections, which every training of transformers asks for."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let what is held at the end be freed as ever."""
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def frozen() -> Iterator[None]:
    """The same for what the tests of a module leave, such as compiled graphs."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def loud() -> None:
    """A command run in this process, by a test or a fixture, silenced the libraries: hear them again."""
    for logger, level in zip(LOGGERS, LEVELS, strict=True):
        logger.setLevel(level)
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def poisoned() -> Iterator[None]:
    """Uninitialised memory is filled with NaN, so an output that nothing wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The CPU in the place of a GPU; spans and programs so few that small inputs take several rounds."""
    from gka.ops.triton import conv, fused, gates, norm

    pytest.importorskip("triton", reason="Triton is made for Linux only")
    if torch.cuda.is_available():
        pytest.skip("with a GPU, test_gpu.py runs the kernels themselves")
    monkeypatch.setattr(fused, "DEVICE", "cpu")
    monkeypatch.setattr(conv, "SPAN", 8)
    monkeypatch.setattr(norm, "PROGRAMS", 3)
    monkeypatch.setattr(gates, "PROGRAMS", 2)
    return monkeypatch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The CUDA device of tests that are marked gpu."""
    assert torch.cuda.is_available(), "these tests need a CUDA device"
    return torch.device("cuda")
