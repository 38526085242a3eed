"""`gka serve`: the server of transformers with a model of this library, called by OpenAI's own client."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
import torch
from fastapi.testclient import TestClient
from model_helpers import random_tokens, tiny_model
from tiny_run import _path, train, write_texts
from transformers import AutoTokenizer, ByT5Tokenizer, CompileConfig, set_seed

from gka.cli import loading, serve
from gka.cli import main as cli
from gka.cli.loading import load_model
from gka.cli.serve import fast_byte_tokenizer, run_server, serving_tokenizer

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}key: "
PROMPTS = ["the state of ", "ridge", "gain key value solve", "λ step\t", "", "of of of of of of of of of of of"]


class Served(NamedTuple):
    """A server's client, and what it serves, loaded here."""

    client: openai.OpenAI
    model: Any
    tokenizer: Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def wait_for(server: subprocess.Popen[str], port: int, log: Path) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
            return
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a hybrid of two layers, whose tokenizer, of bytes, got a chat template."""
    folder = tmp_path_factory.mktemp("serve")
    settings = dict(max_steps=80, learning_rate=1e-2, save_every=80, eval_every=80, attention_layers="1")
    assert train(folder / "run", write_texts(folder / "texts"), **settings) == 0
    (folder / "run" / "model" / "chat_template.jinja").write_text(CHAT)
    return folder / "run"


@pytest.fixture(scope="module")
def served(run: Path) -> Iterator[Served]:
    port, log = free_port(), run / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "gka", "serve", str(run), "--port", str(port), "--device", "cpu"],
            stdout=file,
            stderr=file,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _path()},
        )
    try:
        wait_for(server, port, log)
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=60)
        yield Served(client, load_model(str(run), "cpu"), serving_tokenizer(run / "model"))
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=20)


def test_the_server_s_attention_plans_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watch(**options: Any) -> None:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())

    monkeypatch.setattr("transformers.cli.serve.Serve", watch)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    run_server("it", None, None, "localhost", 0, None)
    assert seen == [False] and torch.backends.cuda.cudnn_sdp_enabled()


def expected(served: Served, ids: torch.Tensor, tokens: int, **options: Any) -> str:
    """What `generate` makes of the prompt."""
    made = served.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **{"do_sample": False, **options}
    )
    return str(served.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def prompt_ids(served: Served, prompt: str) -> torch.Tensor:
    return served.tokenizer(prompt, return_tensors="pt")["input_ids"]


def complete(served: Served, prompt: str, tokens: int, stream: bool, **options: Any) -> str:
    options = {"temperature": 0.0, **options}
    answer = served.client.completions.create(
        model="run", prompt=prompt, max_tokens=tokens, stream=stream, **options
    )
    if not stream:
        return answer.choices[0].text
    parts = [chunk.choices[0].text for chunk in answer]
    assert len([part for part in parts if part]) > 1
    return "".join(parts)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_completions_are_those_of_generate(served: Served, prompt: str, stream: bool) -> None:
    assert complete(served, prompt, 24, stream) == expected(served, prompt_ids(served, prompt), 24)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_completions_are_those_of_generate(served: Served, stream: bool) -> None:
    messages: Any = [{"role": "user", "content": "the state"}, {"role": "assistant", "content": "gain"},
                     {"role": "user", "content": "ridge"}]  # fmt: skip
    answer: Any = served.client.chat.completions.create(
        model="run", messages=messages, max_completion_tokens=20, temperature=0.0, stream=stream
    )
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert len(chunks) > 10 and chunks[-1].choices[0].finish_reason == "length"
    else:
        text = answer.choices[0].message.content
        assert answer.usage.completion_tokens == 20
    ids = served.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    assert served.tokenizer.decode(ids[0]).endswith("user: ridge\nkey: ")
    assert text == expected(served, ids, 20)


def test_requests_at_once_do_not_mix(served: Served) -> None:
    """Twelve requests of six prompts, streamed and not, of different lengths, all at once."""
    requests = [(prompt, 10 + 3 * n, stream) for stream in (False, True) for n, prompt in enumerate(PROMPTS)]
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda request: complete(served, *request), requests))
    for (prompt, tokens, _), answer in zip(requests, answers, strict=True):
        assert answer == expected(served, prompt_ids(served, prompt), tokens)
    assert len({answer[:8] for answer in answers}) > 2, "the prompts matter"


def test_a_client_that_leaves_changes_nothing_for_the_next(served: Served) -> None:
    stream = served.client.completions.create(
        model="run", prompt="the", max_tokens=5000, stream=True, temperature=0
    )
    next(iter(stream))
    stream.close()
    began = time.monotonic()
    assert complete(served, "ridge", 12, False) == expected(served, prompt_ids(served, "ridge"), 12)
    assert time.monotonic() - began < 10, "its generation has been given up"


def test_sampling_and_stopping(served: Served) -> None:
    ids = prompt_ids(served, "the ")
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    config = '{"do_sample": true, "top_k": 0, "max_new_tokens": 20}'
    answer = complete(
        served, "the ", 20, False, temperature=0.7, top_p=0.9, seed=5, extra_body={"generation_config": config}
    )
    set_seed(5)
    assert answer == expected(served, ids, 20, top_k=0, **sampling)
    whole = complete(served, "the ", 30, False)
    stop = whole[4:6]
    cut = complete(served, "the ", 30, False, stop=[stop])
    assert whole.startswith(cut) and cut.endswith(stop) and len(cut) <= 6


def test_the_model_is_listed_and_others_refused(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["run"]
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.completions.create(model="another", prompt="a", max_tokens=1)
    assert caught.value.body == {
        "message": "Server is pinned to 'run'; requested 'another'.",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }


def served_here(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """The server's application, without a network."""
    apps: list[Any] = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server: apps.append(server.config.app))
    run_server("it", model, tokenizer, "localhost", 0, None)
    return TestClient(apps[0], raise_server_exceptions=False)


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_without_a_template_is_refused(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    tokenizer = fast_byte_tokenizer(ByT5Tokenizer(extra_ids=0))
    web: Any = served_here(tiny_model("gka", torch.float32, vocab_size=259), tokenizer, monkeypatch)
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=web)
    messages: Any = [{"role": "user", "content": "a"}]
    for call in (
        lambda: client.chat.completions.create(model="it", messages=messages, stream=stream),
        lambda: client.responses.create(model="it", input="a", stream=stream),
    ):
        with pytest.raises(openai.BadRequestError, match="needs a chat template, and the tokenizer") as caught:
            call()
        assert caught.value.body["type"] == "invalid_request_error"  # type: ignore[index]
    assert client.completions.create(model="it", prompt="a", max_tokens=1, temperature=0).choices
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(openai.BadRequestError, match="the chat template refuses them: roles must alternate"):
        client.chat.completions.create(model="it", messages=messages, stream=stream)
    refused = web.post("/v1/completions", json=["a"])
    assert refused.status_code == 422 and refused.json()["error"]["message"].startswith("body: Input should be a")
    failed = web.post("/v1/chat/completions", json={"model": "it"})
    assert failed.status_code == 500 and failed.json()["error"] == {
        "message": "KeyError: 'messages'", "type": "server_error", "param": None, "code": None,
    }  # fmt: skip
    unfit = web.post("/v1/completions", json={"model": "it", "prompt": "a", "max_tokens": -3, "stream": False})
    assert unfit.status_code == 400 and "must be greater than 0" in unfit.json()["error"]["message"]
    assert web.get("/v1/chat/completions").headers["allow"] == "POST"


# vLLM in place of transformers' server; tests/vllm_plugin/engine/test_server.py runs it


@pytest.fixture
def vllm_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package named vllm that Python can find; nothing here imports it. Temporary folders end with the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / "packages" / "vllm"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    return folder


def became(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> list[str]:
    """The command that `gka serve` replaces its process by."""
    seen: list[list[str]] = []
    monkeypatch.setattr("gka.cli.serve_vllm.os.execv", lambda program, command: seen.append([program, *command]))
    assert cli.main(["serve", *arguments]) == 0
    (command,) = seen
    assert command[:4] == [sys.executable, sys.executable, "-m", "vllm.entrypoints.cli.main"]
    return command[4:]


@pytest.mark.usefixtures("vllm_folder")
def test_vllm_gets_the_model_of_a_run_and_a_fast_tokenizer(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())
    further = ["--enable-prefix-caching", "--hf-overrides", '{"solver_steps": [16]}']
    given = [str(run), "--engine", "vllm", "--port", port, "--dtype", "bfloat16", "--", *further]
    command = became(monkeypatch, given)
    tokenizer = command[command.index("--tokenizer") + 1]
    model = str(run / "model")
    assert command == [
        "serve", model, "--served-model-name", "run", "--tokenizer", tokenizer, "--host", "localhost",
        "--port", port, "--dtype", "bfloat16", *further,
    ]  # fmt: skip
    assert tokenizer != model
    fast, served = AutoTokenizer.from_pretrained(tokenizer), serving_tokenizer(run / "model")
    assert fast("λ\0 b")["input_ids"] == served("λ\0 b")["input_ids"] and fast.chat_template == CHAT
    assert (fast.eos_token_id, fast.pad_token_id) == (served.eos_token_id, served.pad_token_id)


@pytest.mark.usefixtures("vllm_folder")
def test_vllm_reads_a_fast_tokenizer_itself(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("gka", torch.float32).save_pretrained(tmp_path / "model")
    serving_tokenizer(run / "model").save_pretrained(tmp_path / "model")
    command = became(monkeypatch, [str(tmp_path / "model"), "--engine", "vllm", "--name", "it"])
    assert command[1:6] == [str(tmp_path / "model"), "--served-model-name", "it", "--tokenizer", command[1]]


def test_mistakes_with_vllm(run: Path, vllm_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert cli.main(["serve", str(run), *arguments]) == 2
        return capsys.readouterr().err

    assert "--device cpu: not with --engine vllm" in error("--engine", "vllm", "--device", "cpu")
    assert "--default-seed 3: not with" in error("--engine", "vllm", "--default-seed", "3")
    assert "-- --port=1: gka serve sets --port itself" in error("--engine", "vllm", "--", "--port=1")
    assert "--compile: not with --engine vllm" in error("--engine", "vllm", "--compile")
    assert "only with --engine vllm" in error("--", "--enable-prefix-caching")
    assert "--engine" in error("--engine", "vlm")
    (vllm_folder / "__init__.py").unlink()
    importlib.invalidate_caches()
    assert "needs vLLM, which is not installed: pip install" in error("--engine", "vllm")


# Without a server


def test_the_fast_tokenizer_of_bytes_is_that_of_bytes() -> None:
    slow = ByT5Tokenizer(extra_ids=0)
    fast = fast_byte_tokenizer(slow)
    for text in ["def main(\n\t", "überall λ 日本", "\0\x7f", " a  b ", ""]:
        ids = fast(text)["input_ids"]
        assert ids == [slow.eos_token_id, *slow(text)["input_ids"][:-1]]
        assert fast.decode(ids, skip_special_tokens=True) == text


def test_continuous_batching_is_refused() -> None:
    model = tiny_model("gka", torch.float32)
    with pytest.raises(NotImplementedError, match="no place for the states of GKA layers"):
        model.generate_batch([random_tokens(5).tolist()], progress_bar=False)


def test_the_server_has_a_core_of_its_own() -> None:
    before = torch.get_num_threads()
    try:
        for threads, left in ((3, 2), (1, 1)):
            torch.set_num_threads(threads)
            with serve.a_thread_for_the_server():
                assert torch.get_num_threads() == left
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_served_models_compile_their_steps_if_asked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = list[Any]()
    monkeypatch.setattr(serve, "run_server", lambda name, model, *rest: served.append(model))
    port = str(free_port())
    calls = list[Any]()
    backend = CompileConfig(backend=lambda graph, _: calls.append(graph) or graph.forward, mode=None)
    monkeypatch.setattr(loading, "CompileConfig", lambda: backend)
    for options in ([], ["--compile"]):
        assert cli.main(["serve", str(run), "--device", "cpu", "--port", port, *options]) == 0
    without, compiled = (model.generation_config.compile_config for model in served)
    assert without is None and compiled is backend and calls, "the first request does not wait"


def test_mistakes_are_said_in_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", str(run), "--port", port]) == 2
        assert f"cannot listen on localhost:{port}: address already in use" in capsys.readouterr().err
    assert cli.main(["serve", str(run), "--name", "a@b"]) == 2
    assert "--name 'a@b'" in capsys.readouterr().err
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert "is not a checkpoint" in capsys.readouterr().err
    tiny_model("gka", torch.float32).save_pretrained(tmp_path / "bare")
    assert cli.main(["serve", str(tmp_path / "bare")]) == 2
    assert "the tokenizer cannot be loaded" in capsys.readouterr().err
    assert AutoTokenizer.from_pretrained(run / "model").chat_template == CHAT
