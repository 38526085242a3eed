"""Requests at once to `gka serve` with both engines: tokens per second, and the time to the first text.

    python -m benchmarks.bench_serve -- --max-num-seqs 8      # after --: options of `vllm serve`
    python -m benchmarks.bench_serve --engines transformers --hidden-size 32 --layers 1 --tokens 8    # a quick run

Both servers run at the same time, each with --threads threads, and take turns. A round sends all requests to one
server at once, through OpenAI's client, with streaming. Prompts differ in every round. The first round of each
server is not counted.

The model has random weights and makes printable ASCII characters alone. A token is a byte, so the length of an
answer is its number of tokens. Both engines choose the most likely token. "same text" is the part of the answers
that equal those of the first engine.

vLLM on a CPU reads VLLM_CPU_KVCACHE_SPACE (GiB) and VLLM_CPU_OMP_THREADS_BIND from the environment; with
VLLM_CPU_OMP_THREADS_BIND=nobind it has --threads threads.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import write_result
from experiments.evidence.table import markdown_table

ENGINES = ("transformers", "vllm")
NAME = "small"


class Answer(NamedTuple):
    """The text of a request, seconds to its first piece, and seconds to its end."""

    text: str
    first: float
    end: float


def write_model(folder: Path, options: argparse.Namespace) -> int:
    """A model and a tokenizer of bytes; returns the number of parameters."""
    from transformers import ByT5Tokenizer

    from gka import GKAConfig, GKAForCausalLM

    tokenizer = ByT5Tokenizer(extra_ids=0)
    torch.manual_seed(0)
    config = GKAConfig(
        vocab_size=384,
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GKAForCausalLM(config)
    printable = torch.arange(ord(" "), ord("~") + 1) + tokenizer.offset
    others = torch.ones(config.vocab_size, dtype=torch.bool).index_fill_(0, printable, False)
    with torch.no_grad():
        model.lm_head.weight[others] = 0.0  # of 95 logits, the largest is above 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


@contextmanager
def server(engine: str, folder: Path, options: argparse.Namespace) -> Iterator[Any]:
    """A client of a server, which has started."""
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gka", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--name", NAME, "--engine", engine, "--dtype", options.dtype]
    if engine == "vllm":
        command += ["--", *options.further]
    with tempfile.TemporaryFile("w+") as log:
        settings = {"OMP_NUM_THREADS": str(options.threads), "TMPDIR": str(folder.parent)}  # removed at the end
        process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=log, stderr=log)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600)
        try:
            while True:
                try:
                    client.models.list()
                    break
                except openai.APIConnectionError:
                    time.sleep(0.5)
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(f"{shlex.join(command)} stopped:\n{log.read()[-3000:]}")
            yield client
        finally:
            process.terminate()
            process.wait(timeout=60)


def ask(client: Any, prompt: str, tokens: int) -> Answer:
    """One request, greedy, with streaming."""
    begin, first, text = time.perf_counter(), 0.0, ""
    for chunk in client.completions.create(
        model=NAME, prompt=prompt, max_tokens=tokens, temperature=0.0, stream=True
    ):
        piece = chunk.choices[0].text if chunk.choices else ""
        if piece and not text:
            first = time.perf_counter() - begin
        text += piece
    if len(text) != tokens:
        raise RuntimeError(f"the server made {len(text)} characters; expected {tokens}")
    return Answer(text, first, time.perf_counter() - begin)


def one_round(client: Any, prompts: list[str], tokens: int) -> tuple[list[Answer], float]:
    """All requests at once; their answers, and the seconds until the last has ended."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        begin = time.perf_counter()
        answers = list(pool.map(lambda prompt: ask(client, prompt, tokens), prompts))
        return answers, time.perf_counter() - begin


def random_prompts(requests: int, tokens: int, seed: int) -> list[str]:
    """Texts of so many tokens, with the token that starts a document."""
    draw = random.Random(seed)
    letters = string.ascii_lowercase + " "
    return ["".join(draw.choices(letters, k=tokens - 1)) for _ in range(requests)]


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "largest": max(values)}


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place) / "model"
        parameters = write_model(folder, options)
        clients = {engine: stack.enter_context(server(engine, folder, options)) for engine in options.engines}
        for requests in options.requests:
            rates: dict[str, list[float]] = {engine: [] for engine in clients}
            answers: dict[str, list[Answer]] = {engine: [] for engine in clients}
            for turn in range(options.repeats + 1):
                prompts = random_prompts(requests, options.prompt, seed=1000 * requests + turn)
                for engine, client in clients.items():
                    found, seconds = one_round(client, prompts, options.tokens)
                    if turn:  # the first round warms up
                        answers[engine] += found
                        rates[engine].append(requests * options.tokens / seconds)
            base = [answer.text for answer in answers[options.engines[0]]]
            for engine, made in answers.items():
                same = [answer.text == text for answer, text in zip(made, base, strict=True)]
                row = {
                    "engine": engine,
                    "requests": requests,
                    "prompt": options.prompt,
                    "tokens": options.tokens,
                    "tokens per second": spread(rates[engine]),
                    "first text": spread([answer.first for answer in made]),
                    "end": spread([answer.end for answer in made]),
                    "same text": sum(same) / len(same),
                    "layers": options.layers,
                    "hidden": options.hidden_size,
                    "heads": options.heads,
                    "parameters": parameters,
                    "dtype": options.dtype,
                    "threads": options.threads,
                }
                print({key: row[key] for key in list(row)[:8]}, flush=True)
                yield row


def serve_table(result: dict[str, Any]) -> str:
    """Tokens per second and waiting time of both engines, one row per number of requests."""
    rows, table = result["rows"], []
    for row in rows:
        rate, first, end = row["tokens per second"], row["first text"], row["end"]
        table.append(
            [
                str(row["requests"]),
                row["engine"],
                f"{rate['median']:.0f} ({rate['least']:.0f} to {rate['largest']:.0f})",
                f"{first['median']:.2f} ({first['largest']:.2f})",
                f"{end['median']:.2f} ({end['largest']:.2f})",
                f"{row['same text']:.0%}",
            ]
        )
    one = rows[0]
    threads = "1 thread" if one["threads"] == 1 else f"{one['threads']} threads"
    header = [
        "requests at once",
        "engine",
        "tokens/s in all (range of rounds)",
        "seconds to the first text (longest)",
    ]
    header += ["seconds to the end (longest)", "same text"]
    shape = (
        f"{one['layers']} GKA layers, hidden size {one['hidden']}, {one['heads']} heads, "
        f"{one['parameters'] / 1e6:.1f} M parameters, {one['dtype']}; prompts of {one['prompt']} tokens, "
        f"{one['tokens']} new tokens; {threads} for each server; medians"
    )
    return f"Requests at once ({shape})\n\n{markdown_table(header, table)}"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_serve", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="default: both")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8], metavar="N", help="requests at once")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a request")
    parser.add_argument("--layers", type=int, default=4, help="number of blocks")
    parser.add_argument("--hidden-size", type=int, default=256, help="width of the residual stream")
    parser.add_argument("--heads", type=int, default=4, help="number of heads")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype of the weights")
    parser.add_argument("--threads", type=int, default=1, help="threads of each server")
    parser.add_argument("--repeats", type=int, default=3, help="counted rounds, of which the median is shown")
    parser.add_argument("--output", type=Path, help="JSON file; default: serve_MACHINE_DATE.json in results/")
    parser.add_argument("further", nargs="*", help="options of `vllm serve`, after --")
    options = parser.parse_args(arguments)
    if options.further and "vllm" not in options.engines:
        parser.error(f"-- {shlex.join(options.further)}: only with the engine vllm")
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    command = shlex.join(["python", "-m", "benchmarks.bench_serve", *sys.argv[1:]])
    write_result("serve", bench(options), command, options.output)


if __name__ == "__main__":
    main()
