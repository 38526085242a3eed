"""Accuracy and time with fewer solver steps, on a model trained with the default steps.

gka train --config configs/demo.yaml
python -m benchmarks.bench_steps runs/demo

Rows of part "accuracy" use the trained model. They have the bits per byte on the held-out text of the run, and the
error ||o - o*|| / ||o*|| of the output of the op, where o* uses the exact solve in float64. The inputs of the op
are recorded from the layers, with default steps, on the first tokens of that text. For bfloat16 the inputs are
rounded before both computations.

Rows of part "time" use a model with random weights and heads of 128 dims. They have the processor seconds of one
thread, which depend little on other programs, for a forward pass over a prompt and for one generated token after
it.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.common import write_result
from experiments.evidence.recorded import recorded
from gka import GKAConfig, GKAForCausalLM
from gka.cli.evaluate import score_texts, total_score
from gka.cli.loading import find_checkpoint, load_checkpoint
from gka.ops import gated_kalmanet, reference
from gka.training.data import document_token, encode, validation_texts

STEPS = ([31], [24], [16], [12], [8], [4], [2], [1], [16, 16], [16, 8], [8, 8])
DECODED = 16  # tokens per timed call


def errors(calls: list[dict[str, Any]], dtype: torch.dtype, solver_steps: list[list[int]]) -> list[float]:
    """The error of o over all layers, for each of `solver_steps`."""
    squares, norm = [0.0] * len(solver_steps), 0.0
    for call in calls:
        q, k, v = (call[name].to(dtype) for name in ("q", "k", "v"))
        tensors = (q, k, v, call["g"], call["alpha"], call["beta"])
        options: dict[str, Any] = {"ridge_ratio": call["ridge_ratio"], "normalize_qk": True}
        exact, _ = reference.gated_kalmanet(
            *tensors, **options, solver_steps=None, scale=q.shape[3] ** -0.5, initial_state=None,
            output_final_state=False, cu_seqlens=None,
        )  # fmt: skip
        norm += float(exact.square().sum())
        for number, stages in enumerate(solver_steps):
            o, _ = gated_kalmanet(*tensors, **options, solver_steps=stages)
            squares[number] += float((o.double() - exact).square().sum())
    return [(square / norm) ** 0.5 for square in squares]


@torch.inference_mode()
def accuracy(
    checkpoint: str, tokens: int, max_bytes: int, solver_steps: list[list[int]]
) -> Iterator[dict[str, Any]]:
    model, tokenizer = load_checkpoint(checkpoint, "cpu")
    texts = validation_texts(find_checkpoint(checkpoint).parent / "data", max_bytes)
    start = [document_token(tokenizer)]
    ids = torch.tensor([start + encode(tokenizer, b"".join(text for _, text in texts)).tolist()[: tokens - 1]])
    with recorded() as calls:
        model(ids, use_cache=False)
    both = [errors(calls, dtype, solver_steps) for dtype in (torch.float32, torch.bfloat16)]
    trained = model.config.solver_steps
    for number, stages in enumerate(solver_steps):
        model.set_solver_steps(stages)
        total = total_score(score_texts(model, tokenizer, texts, window=1024, batch_size=4))
        yield {
            "part": "accuracy",
            "steps": stages,
            "trained with": trained,
            "heads": model.config.num_attention_heads,
            "D": model.config.head_dim,
            "layers": model.config.num_hidden_layers,
            "bits per byte": total.bits_per_byte,
            "loss": total.loss,
            "bytes": total.bytes,
            "tokens of o": tokens,
            "error of o, float32": both[0][number],
            "error of o, bfloat16": both[1][number],
        }


def processor_seconds(
    function: Callable[[list[int]], None], solver_steps: list[list[int]], repeats: int
) -> dict[str, dict[str, float]]:
    """Median, smallest and largest processor seconds per call for each of `solver_steps`; calls take turns."""
    measured: dict[str, list[float]] = {str(stages): [] for stages in solver_steps}
    for turn in range(repeats + 1):
        for stages in solver_steps:
            begin = time.process_time()
            function(stages)
            if turn > 0:  # the first call is a warm-up
                measured[str(stages)].append(time.process_time() - begin)
    return {
        name: {"median": statistics.median(values), "least": min(values), "largest": max(values)}
        for name, values in measured.items()
    }


@torch.inference_mode()
def times(options: argparse.Namespace, solver_steps: list[list[int]]) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 4, "num_hidden_layers": 4}
    model = GKAForCausalLM(GKAConfig(vocab_size=1024, **sizes)).eval()
    prompt, token = torch.randint(0, 1024, (1, options.prompt)), torch.tensor([[1]])
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)

    def prefill(stages: list[int]) -> None:
        model.set_solver_steps(stages)
        model(prompt, use_cache=False)

    def decode(stages: list[int]) -> None:
        model.set_solver_steps(stages)
        for _ in range(DECODED):
            model(token, past_key_values=cache)

    found = [
        processor_seconds(prefill, solver_steps, options.repeats),
        processor_seconds(decode, solver_steps, options.repeats),
    ]
    for stages in solver_steps:
        per_token = {name: value / DECODED for name, value in found[1][str(stages)].items()}
        yield {
            "part": "time",
            "steps": stages,
            "T": options.prompt,
            "dtype": "float32",
            **sizes,
            "D": model.config.head_dim,
            "prefill seconds": found[0][str(stages)],
            "decode seconds": per_token,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="folder of a run of gka train")
    parser.add_argument("--tokens", type=int, default=1024, help="number of tokens for the error of o")
    parser.add_argument("--max-bytes", type=int, default=60000, help="bytes of held-out text")
    parser.add_argument("--prompt", type=int, default=1024, help="number of tokens of the timed prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--solver-steps", default="", help="choices of steps, e.g. 31;8;16,16; default: the choices in RESULTS.md"
    )
    parser.add_argument("--output", type=Path, help="JSON file; default: a new file in benchmarks/results/")
    options = parser.parse_args()
    solver_steps = [list(map(int, part.split(","))) for part in options.solver_steps.split(";") if part] or list(
        STEPS
    )

    def rows() -> Iterator[dict[str, Any]]:
        yield from accuracy(options.checkpoint, options.tokens, options.max_bytes, solver_steps)
        yield from times(options, solver_steps)

    command = shlex.join(["python", "-m", "benchmarks.bench_steps", *sys.argv[1:]])
    write_result("steps", rows(), command, options.output)


if __name__ == "__main__":
    main()
