"""`gka generate`: the same seed the same text, the prompt from where it comes, the text as it is made."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_run import _path, command, run_process, train, write_texts
from torch._inductor import cpp_builder
from transformers import CompileConfig

from gka.cli import loading
from gka.cli import main as cli
from gka.cli.generate import generate, ready_attention
from gka.cli.loading import load_checkpoint
from gka.hf import compiled_step
from gka.training.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    place = tmp_path_factory.mktemp("generate")
    assert train(place / "run", write_texts(place / "texts"), max_steps=60, learning_rate=1e-2) == 0
    return place / "run"


@pytest.fixture(scope="module")
def loaded(run: Path) -> tuple[Any, Any]:
    return load_checkpoint(str(run), "cpu")


def test_the_seed_decides_the_text(loaded: tuple[Any, Any]) -> None:
    texts = [generate(*loaded, "the", max_new_tokens=40, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_attention_plans_nothing_while_text_is_made(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    seen: list[bool] = []
    real = model.generate

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*arguments, **options)

    monkeypatch.setattr(model, "generate", watched)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    generate(model, tokenizer, "the", max_new_tokens=2)
    assert before and seen == [False] and torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(KeyError), ready_attention():
        raise KeyError
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_temperature_0_takes_the_likeliest_token(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    text = generate(model, tokenizer, "the st", max_new_tokens=12, temperature=0)
    ids = [1, *(byte + 3 for byte in b"the st")]
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert text == tokenizer.decode(ids[7:], skip_special_tokens=True)


def test_top_p_leaves_the_unlikely_out(loaded: tuple[Any, Any]) -> None:
    greedy = generate(*loaded, "key", max_new_tokens=20, temperature=0)
    assert generate(*loaded, "key", max_new_tokens=20, temperature=1.0, top_p=1e-6, seed=5) == greedy


def test_the_stream_is_the_prompt_and_the_text(loaded: tuple[Any, Any]) -> None:
    for prompt in ("", "überall λ", "a  b \n"):
        stream = io.StringIO()
        text = generate(*loaded, prompt, max_new_tokens=30, seed=0, file=stream)
        assert stream.getvalue() == prompt + text


def test_the_text_appears_as_it_is_made(loaded: tuple[Any, Any]) -> None:
    class Listener(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            Listener.writes += bool(text)
            return super().write(text)

    generate(*loaded, "the", max_new_tokens=60, temperature=1.0, seed=1, file=Listener())
    assert Listener.writes > 3


def test_the_command_prints_prompt_and_text(
    run: Path, loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert cli.main(command("generate", str(run), prompt="the ", max_new_tokens=20, seed=2)) == 0
    expected = generate(*loaded, "the ", max_new_tokens=20, seed=2)
    assert capsys.readouterr().out == f"the {expected}\n"


def test_compiled_steps_give_the_same_text(
    run: Path, loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    settings = dict(prompt="the ", max_new_tokens=20, temperature=0)
    with mock.patch.object(compiled_step, "CompiledDecoding", wraps=compiled_step.CompiledDecoding) as used:
        assert cli.main([*command("generate", str(run), **settings), "--compile"]) == 0
    used.assert_called_once()
    del settings["prompt"]
    expected = generate(*loaded, "the ", **settings)  # type: ignore[arg-type]
    assert capsys.readouterr().out == f"the {expected}\n"
    assert loading.load_model(str(run), "cpu").generation_config.compile_config is None
    model = mock.Mock(device=torch.device("cpu"))
    loading.compile_steps(model)
    assert isinstance(model.generation_config.compile_config, CompileConfig)
    with pytest.raises(UserError, match="--compile is for a CPU"):
        loading.compile_steps(mock.Mock(device=torch.device("cuda")))
    with (
        cpp_builder.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(UserError, match="needs a C\\+\\+ compiler"),
    ):
        loading.compile_steps(model)


def test_the_prompt_from_standard_input(run: Path) -> None:
    arguments = command("generate", str(run), prompt="-", max_new_tokens=5, temperature=0)
    assert run_process(*arguments, input="solve λ\n").stdout.startswith("solve λ")


def test_a_prompt_that_is_not_text(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert cli.main(["generate", str(run), "--prompt", "-"]) == 2
    assert "standard input is not UTF-8" in capsys.readouterr().err
    assert cli.main(["generate", str(run), "--prompt", "\udcff"]) == 2
    assert "--prompt is not UTF-8" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error(run: Path) -> None:
    arguments = command("generate", str(run), prompt="the", max_new_tokens=400, seed=0)
    process = subprocess.Popen(
        [sys.executable, "-m", "gka", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": _path(), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(3)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0
