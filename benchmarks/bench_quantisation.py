"""What 4-bit weights cost in accuracy, kind by kind of module, on a trained model; bitsandbytes' nf4, on a CPU.

gka train --config configs/demo.yaml
python -m benchmarks.bench_quantisation runs/demo

Prints the relative error of the logits, ||l - l*|| / ||l*||, on the start of the run's held-out text, as a table
for docs/tools.md: l* in float32, l with linear maps of one kind quantised, all but the gates, and all.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes.functional
import bitsandbytes.nn.modules
import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

import gka.hf.pretrained
from gka import GKAForCausalLM
from gka.cli.loading import find_checkpoint, load_checkpoint
from gka.training.data import encode, validation_texts

TOKENS = 512
GATES = ("a_proj", "b_proj", "alpha_proj")
LINEAR = (*GATES, "q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def use_kernels_for_every_size() -> None:
    """Those for processors with 16-bit instructions take no weight with fewer than 32 rows, such as a gate's."""
    for module in (bitsandbytes.nn.modules, bitsandbytes.functional):
        module.has_avx512bf16 = lambda: False


@torch.no_grad()
def logits(source: Path, tokens: Tensor, quantised: set[str], bits: int) -> Tensor:
    """[1, T, vocabulary] with the linear maps of these names quantised."""
    spared = ["lm_head", *(f".{name}" for name in set(LINEAR) - quantised)]
    kinds: dict[int, dict[str, Any]] = {
        4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
        8: {"load_in_8bit": True},
    }
    with mock.patch.object(gka.hf.pretrained, "_GATES", ()):
        settings = BitsAndBytesConfig(llm_int8_skip_modules=spared, **kinds[bits])
        model = GKAForCausalLM.from_pretrained(source, quantization_config=settings, dtype=torch.float32)
    found: Tensor = model(tokens).logits
    return found


@torch.no_grad()
def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_quantisation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="folder of a run of gka train")
    run = Path(parser.parse_args().run)
    use_kernels_for_every_size()
    model, tokenizer = load_checkpoint(str(run))
    text = b"".join(text for _, text in validation_texts(run / "data", TOKENS))
    tokens = torch.from_numpy(encode(tokenizer, text)[:TOKENS].astype("int64")).unsqueeze(0)
    expected = model(tokens).logits
    rows = {f"`{name}`": {name} for name in LINEAR}
    rows |= {"all but the gates": set(LINEAR) - set(GATES), "all": set(LINEAR)}
    print("| quantised | 4 bits (nf4) | 8 bits |\n|---|---|---|")
    for title, names in rows.items():
        errors = [
            (logits(find_checkpoint(str(run)), tokens, names, bits) - expected).norm() / expected.norm()
            for bits in (4, 8)
        ]
        print(f"| {title} | {errors[0]:.1%} | {errors[1]:.2%} |")


if __name__ == "__main__":
    main()
