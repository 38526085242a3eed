"""`gka train` on a CUDA device: `make test-gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu
pytest.importorskip("tensorboard")

from tiny_run import train, write_texts  # noqa: E402

from gka.training.trainer import ProgressCallback  # noqa: E402


@pytest.mark.parametrize("changed", [{}, {"loss_chunk": 40}], ids=["plain", "chunks"])
def test_steps_do_not_wait_for_the_device(
    changed: dict[str, Any], device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the end of step 3 to the end of step 6, batches and two micro-steps each, without logs and saves."""
    watched, end = [], ProgressCallback.on_step_end

    def on_step_end(self: ProgressCallback, args: Any, state: Any, control: Any, **rest: Any) -> None:
        end(self, args, state, control, **rest)
        if state.global_step == 3:
            torch.cuda.set_sync_debug_mode("error")
        elif state.global_step == 6:
            torch.cuda.set_sync_debug_mode("default")
            watched.append(state.global_step)

    monkeypatch.setattr(ProgressCallback, "on_step_end", on_step_end)
    options = dict(
        device="auto", dtype="bfloat16", max_steps=8, log_every=8, eval_every=8, save_every=8, accumulation=2
    )
    try:
        assert train(tmp_path / "run", write_texts(tmp_path / "texts"), **{**options, **changed}) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched == [6]
