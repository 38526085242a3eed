"""`torchrun --nproc_per_node 2 tests/parallel_devices_run.py`: models whose tokens GPUs share, beside one GPU.

It prints the errors ||out - ref|| / ||ref|| of loss, logits and all gradients together, and fails above
the bounds. Without GPUs it runs on the CPU. The model is a hybrid with full and sliding attention.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from helpers import relative_error
from model_helpers import random_tokens, tiny_config
from torch import Tensor

from gka import GKAForCausalLM
from gka.distributed import ContextParallel, RanksDisagree, parallelize

T = 512
# In float32 each of the two ways is up to 2e-4 from float64.
BOUNDS = {torch.float32: 5e-4, torch.bfloat16: 3e-2}
SIZES: dict[str, Any] = dict(hidden_size=256, intermediate_size=512, head_dim=64, sliding_window=70)
TOLD: dict[str, dict[str, Tensor]] = {
    "rows": {},
    "packed": {"cu_seq_lens_q": torch.tensor([0, 5, 200, 201, 300, T])},
    "padding": {"attention_mask": (torch.arange(T) < 450).long().unsqueeze(0)},
}


def results(model: GKAForCausalLM, batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The loss, the logits, and all gradients in one vector."""
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        out = model(**batch, use_cache=False)
    out.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    model.zero_grad()
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), "gradient": gradient}


def compare(device: torch.device, layout: Any, told: str, dtype: torch.dtype) -> dict[str, float]:
    """The errors of one case."""
    torch.manual_seed(0)
    model = GKAForCausalLM(tiny_config("hybrid, all three", **SIZES)).to(device)
    tokens = random_tokens(1, T)
    batch = {"input_ids": tokens, "labels": tokens, **TOLD[told]}
    batch = {name: x if name == "cu_seq_lens_q" else x.to(device) for name, x in batch.items()}
    expected = results(model, batch, dtype)
    context = ContextParallel(dist.group.WORLD, layout)
    parallelize(model, context)
    found = results(model, batch, dtype)
    found["logits"] = context.shard(T).gather(found["logits"])
    dist.all_reduce(found["gradient"])
    found["gradient"] /= context.size
    return {name: relative_error(found[name], expected[name]) for name in expected}


def disagreement() -> str:
    """The error of ranks that plan rows of different lengths; the hosts compare them, whatever the group."""
    try:
        ContextParallel(dist.group.WORLD).shard(T + dist.get_rank())
    except RanksDisagree as error:
        return str(error)
    return "no error"


def main() -> None:
    """All cases."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    wrong = []
    for layout in ("contiguous", "zigzag"):
        for told in TOLD:
            for dtype, bound in BOUNDS.items():
                errors = compare(device, layout, told, dtype)
                wrong += [(layout, told, dtype, errors)] if max(errors.values()) > bound else []
                if dist.get_rank() == 0:
                    print(
                        layout, told, dtype, {name: f"{error:.1e}" for name, error in errors.items()}, flush=True
                    )
    told = disagreement()
    dist.destroy_process_group()
    assert not wrong, wrong
    assert f"T: {T} on rank 0; {T + 1} on rank 1" in told, told


if __name__ == "__main__":
    main()
