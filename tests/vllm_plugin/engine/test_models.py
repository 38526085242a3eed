"""Every option of a configuration in vLLM: greedy tokens and log-probabilities are those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_helpers import KINDS, assert_equal, engine, engine_model, generated, random_prompts

PROMPTS = random_prompts(1, 2, 7, 40, 150)


@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind: str, tmp_path: Path) -> None:
    model = engine_model(kind, tmp_path)
    with engine(tmp_path) as llm:
        outputs = generated(llm, PROMPTS)
    assert_equal(model, outputs)
