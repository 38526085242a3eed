"""Tables that are kept between calls, and CUDA graphs: tests/nn/test_gpu.py captures some."""

from __future__ import annotations

import threading
from unittest import mock

import pytest
import torch

from gka.ops.triton import chunk_table, kept

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_graph_makes_its_own_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    held = chunk_table.even_chunks(2, 70, 64, 64, CPU)
    assert all(x is y for x, y in zip(held, chunk_table.even_chunks(2, 70, 64, 64, CPU), strict=True))
    monkeypatch.setattr(chunk_table, "capturing", lambda device: True)
    own = chunk_table.even_chunks(2, 70, 64, 64, CPU)
    assert all(x.equal(y) and x is not y for x, y in zip(held, own, strict=True))
    assert not any(x is y for x, y in zip(own, chunk_table.even_chunks(2, 70, 64, 64, CPU), strict=True))


def test_what_is_kept_is_made_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocation there is in no graph's memory. It is over when the call returns, so any stream may read it."""
    monkeypatch.setattr(kept, "capturing", lambda device: False)
    stream = mock.Mock()
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: stream)
    assert kept.to_keep(threading.get_ident, GPU) != threading.get_ident()
    stream.synchronize.assert_called_once_with()


def test_capturing_before_the_first_call_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="captured before the first call"):
        kept.to_keep(list, GPU)
