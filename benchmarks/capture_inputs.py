"""Save the inputs of the op in the layers of a trained model: accuracy depends on the states that training makes.

    gka train --config configs/demo.yaml --head-dim 64 --output runs/capture
    python -m benchmarks.capture_inputs runs/capture

The file has q, k, v (bfloat16, before they are normalised) and g, alpha, beta (float32) of every layer, for the
first tokens of the held-out text. `tests.families.trained_inputs` reads it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from experiments.evidence.recorded import INPUTS, recorded
from gka.cli.loading import find_checkpoint, load_checkpoint
from gka.training.data import document_token, encode, validation_texts
from tests.families import TRAINED


@torch.inference_mode()
def capture(checkpoint: str, tokens: int, output: Path) -> None:
    model, tokenizer = load_checkpoint(checkpoint, "cpu")
    texts = validation_texts(find_checkpoint(checkpoint).parent / "data", 8 * tokens)
    start = [document_token(tokenizer)]
    ids = torch.tensor([start + encode(tokenizer, b"".join(text for _, text in texts)).tolist()[: tokens - 1]])
    with recorded() as calls:
        model(ids, use_cache=False)
    tensors = {
        f"{layer}.{name}": (call[name].bfloat16() if name in ("q", "k", "v") else call[name].float()).contiguous()
        for layer, call in enumerate(calls)
        for name in INPUTS
    }
    save_file(tensors, output)
    print(f"{output}: {len(calls)} layers, {tokens} tokens, {output.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.capture_inputs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="folder of a run of gka train")
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--output", type=Path, default=TRAINED)
    options = parser.parse_args()
    capture(options.checkpoint, options.tokens, options.output)


if __name__ == "__main__":
    main()
