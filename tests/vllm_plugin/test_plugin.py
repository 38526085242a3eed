"""The entry point without vLLM: which versions it takes, and that nothing imports vLLM before it is called."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import gka
from gka.vllm.plugin import SUPPORTED, register, version_problem


@pytest.mark.parametrize("version", [f"{minor}.{rest}" for minor in SUPPORTED for rest in ("0", "1.dev3+cpu")])
def test_supported_version(version: str) -> None:
    assert version_problem(version) is None


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0rc1", "0.3.2", "1.32.0", "dev"])
def test_other_version_is_named_with_ours(version: str) -> None:
    problem = version_problem(version)
    assert problem is not None and "\n" not in problem
    assert version in problem and gka.__version__ in problem and all(minor in problem for minor in SUPPORTED)


def test_nothing_of_vllm_is_imported_before_it_loads_the_plugin() -> None:
    code = "import sys, gka.vllm.plugin, gka.vllm.core, gka.vllm.states; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_vllm_that_cannot_be_told_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may serve other models; the warning names both versions."""
    unknown = ModuleType("vllm")
    unknown.__version__ = "0.40.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", unknown)
    register()
    assert "0.40.1" in caplog.text and gka.__version__ in caplog.text
