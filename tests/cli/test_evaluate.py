"""Bits per byte: the definition, and that neither window nor batch changes them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import command, train, write_texts

from gka.cli import main as cli
from gka.cli.evaluate import Score, document_nats, score_texts, total_score
from gka.cli.loading import load_checkpoint
from gka.hf.cache_name import CACHE, takes_cache
from gka.training.data import encode, load_tokenizer

TEXTS = [
    ("long", ("state ridge λ key " * 40).encode()),
    ("one", b"x"),
    ("middle", b"value solve decay\n" * 7),
    ("short", "überall".encode()),
]


@pytest.fixture(scope="module", params=["all-gka", "hybrid"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    place = tmp_path_factory.mktemp("evaluate")
    layers = {"attention_layers": "1"} if request.param == "hybrid" else {}
    assert train(place / "run", write_texts(place / "texts"), max_steps=8, **layers) == 0
    return place / "run"


@pytest.fixture(scope="module")
def loaded(run: Path) -> tuple[Any, Any]:
    return load_checkpoint(str(run), "cpu")


def direct_nats(model: Any, ids: list[int]) -> float:
    """-log p of the tokens after the start token, from one forward pass in float64."""
    inputs = torch.tensor([[1, *ids]])
    with torch.no_grad():
        logs = model(inputs, use_cache=False).logits.double().log_softmax(-1)[0]
    return -sum(logs[position, token].item() for position, token in enumerate(ids))


def test_it_is_the_definition(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    for (name, text), score in zip(
        TEXTS, score_texts(model, tokenizer, TEXTS, window=4096, batch_size=1), strict=True
    ):
        ids = encode(tokenizer, text).tolist()
        nats = direct_nats(model, ids)
        assert (score.name, score.tokens, score.bytes) == (name, len(ids), len(text))
        assert score.nats == pytest.approx(nats, rel=1e-5)
        assert score.bits_per_byte == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)
        assert score.loss == pytest.approx(nats / len(ids), rel=1e-5)


@pytest.mark.parametrize("window", [1, 7, 64, 719, 720, 1000])
def test_the_window_does_not_change_it(loaded: tuple[Any, Any], window: int) -> None:
    model, tokenizer = loaded
    texts = TEXTS if window > 1 else TEXTS[1:]
    expected = score_texts(model, tokenizer, texts, window=10**6, batch_size=1)
    for score, right in zip(
        score_texts(model, tokenizer, texts, window=window, batch_size=1), expected, strict=True
    ):
        assert score.nats == pytest.approx(right.nats, rel=1e-5)


def test_carrying_the_state_matters(loaded: tuple[Any, Any]) -> None:
    """The same windows without the state between them give another number: the test above can fail."""
    model, tokenizer = loaded
    ids = encode(tokenizer, TEXTS[0][1])
    whole = document_nats(model, [ids], 1, window=64, batch_size=1)[0]
    forgetful = sum(
        document_nats(model, [ids[i : i + 64]], int(ids[i - 1]) if i else 1, window=64, batch_size=1)[0]
        for i in range(0, len(ids), 64)
    )
    assert abs(forgetful / whole - 1) > 1e-4


@pytest.mark.parametrize("batch_size", [2, 3, 4, 9])
def test_reading_side_by_side_does_not_change_it(loaded: tuple[Any, Any], batch_size: int) -> None:
    model, tokenizer = loaded
    expected = score_texts(model, tokenizer, TEXTS, window=50, batch_size=1)
    found = score_texts(model, tokenizer, TEXTS, window=50, batch_size=batch_size)
    for score, right in zip(found, expected, strict=True):
        assert score.name == right.name
        assert score.nats == pytest.approx(right.nats, rel=1e-5)


def test_every_token_is_reported_once(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    documents = [encode(tokenizer, text) for _, text in TEXTS]
    told: list[int] = []
    document_nats(model, documents, 1, window=50, batch_size=3, on_tokens=told.append)
    assert sum(told) == sum(map(len, documents))


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary() -> None:
    class Uniform(torch.nn.Module):
        device = torch.device("cpu")

        @takes_cache
        def forward(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
            assert use_cache

            class Output:
                logits = torch.zeros(*input_ids.shape, 259)

            setattr(Output, CACHE, past_key_values)
            return Output

    scores = score_texts(Uniform(), load_tokenizer(None), TEXTS, window=16, batch_size=2)
    for score in scores:
        assert score.bits_per_byte == pytest.approx(math.log2(259))
    assert total_score(scores).bits_per_byte == pytest.approx(math.log2(259))


def test_the_total_weighs_texts_by_their_bytes() -> None:
    total = total_score([Score("a", 10 * math.log(2), 5, 10), Score("b", 90 * math.log(2), 45, 30)])
    assert total.bits_per_byte == pytest.approx(100 / 40)
    assert (total.tokens, total.bytes) == (50, 40)


def test_no_documents_give_nothing() -> None:
    assert document_nats(None, [], 1, window=4, batch_size=2) == []
    assert np.isfinite(0.0)


def test_without_data_it_is_the_held_out_text_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(command("eval", str(run), json=True, max_bytes=400)) == 0
    found = json.loads(capsys.readouterr().out)["total"]
    expected = json.loads((run / "metrics.json").read_text())["validation"]
    assert found["bytes"] == expected["bytes"]
    assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)


def test_the_report(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_texts(tmp_path / "texts", files=3)
    capsys.readouterr()
    assert cli.main(command("eval", str(run), data=[texts], per_file=True, window=100)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert [line.split()[0] for line in lines[1:4]] != []
    assert {line.split()[0] for line in lines[1:4]} == {"text0.txt", "text1.txt", "text2.txt"}
    assert cli.main(command("eval", str(run), data=[texts], per_file=True, json=True)) == 0
    report = json.loads(capsys.readouterr().out)
    assert sum(file["bytes"] for file in report["files"]) == report["total"]["bytes"]
    assert f"{report['total']['bits_per_byte']:.4f} bits per byte" in lines[4]
