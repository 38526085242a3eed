"""Models with bfloat16 weights, sharded in several CPU processes by each of those who shard.

torchrun --nproc_per_node 2 -m fsdp_narrow_run FOLDER    what tests/training/test_fsdp_narrow.py needs
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from fsdp_run import fsdp_on_cpus
from helpers import relative_error
from model_helpers import losses_of_training, random_tokens, tiny_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import LlamaConfig, LlamaForCausalLM

import gka
from gka import GKAForCausalLM
from gka.hf.block import GKABlock

NARROW = torch.bfloat16


def loaded(folder: Path) -> GKAForCausalLM:
    """A float32 checkpoint, loaded in bfloat16."""
    model: GKAForCausalLM = GKAForCausalLM.from_pretrained(folder / "model", dtype=NARROW)
    return model


def converted(folder: Path) -> GKAForCausalLM:
    """A Llama with bfloat16 weights, one of whose layers is replaced; the same in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=2
    )
    return gka.convert(LlamaForCausalLM(config).to(NARROW), [1]).eval()


Sharded = tuple[nn.Module, torch.optim.Optimizer]


def by_hand(make: Callable[[], Any], **options: Any) -> Sharded:
    """FSDP2, block by block."""
    model = make()
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model, torch.optim.SGD(model.parameters(), lr=1.0)


def by_fsdp1(make: Callable[[], Any], **options: Any) -> Sharded:
    """FSDP1, block by block."""
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={GKABlock})
    model = FullyShardedDataParallel(make(), auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)
    return model, torch.optim.SGD(model.parameters(), lr=1.0)


def by_accelerate(make: Callable[[], Any]) -> Sharded:
    """FSDP2 by accelerate, which sends the weights of one process to the other."""
    fsdp_on_cpus()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GKABlock"],
        cpu_ram_efficient_loading=True,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = make()
    prepared: Sharded = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    return prepared


_POLICY = MixedPrecisionPolicy(param_dtype=NARROW, reduce_dtype=torch.float32)
_PRECISION = MixedPrecision(param_dtype=NARROW, reduce_dtype=torch.float32)
CASES: dict[str, tuple[Callable[[Path], Any], Callable[..., Sharded]]] = {
    "FSDP2": (loaded, by_hand),
    "FSDP2, mixed precision": (loaded, functools.partial(by_hand, mp_policy=_POLICY)),
    "FSDP2, converted": (converted, by_hand),
    "FSDP1": (loaded, by_fsdp1),
    "FSDP1, original parameters": (loaded, functools.partial(by_fsdp1, use_orig_params=True)),
    "FSDP1, mixed precision": (loaded, functools.partial(by_fsdp1, mixed_precision=_PRECISION)),
    "accelerate": (loaded, by_accelerate),
}


def outcome(name: str, folder: Path) -> dict[str, Any]:
    """How far the sharded model's logits are from the unsharded one's, and what a training step changes."""
    make, shard = CASES[name]
    tokens = random_tokens(2, 25, seed=dist.get_rank())
    alone = make(folder)
    with torch.no_grad():
        expected = alone(tokens).logits
    model, optimizer = shard(functools.partial(make, folder))
    with torch.no_grad():
        error = relative_error(model(tokens).logits, expected)
    losses = losses_of_training(model, tokens, optimizer, steps=2)
    found = {"error": error, "losses": losses}
    if isinstance(model, FullyShardedDataParallel):
        return found  # on a CPU FSDP1 gives no state_dict of bfloat16 weights
    after = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        before = alone.state_dict()
        found["unmoved"] = [n for n in before if "gka" in n and torch.equal(before[n], after[n])]
        alone.load_state_dict(after)  # says if a name is missing
        alone.save_pretrained(folder / name, state_dict=after)
        read = GKAForCausalLM.from_pretrained(folder / name).state_dict()
        found["lost"] = [n for n, value in alone.state_dict().items() if not torch.equal(read[n], value)]
    return found


def main() -> None:
    """All cases, in one launch."""
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        tiny_model("hybrid", torch.float32).save_pretrained(folder / "model")
    dist.barrier()
    found = {name: outcome(name, folder) for name in CASES}
    (folder / f"seen {dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
