"""A model on several GPUs, compared with the same model on one; kernels run with the heads of the process.

torchrun --nproc_per_node 2 -m sharding_gpu_run FOLDER    for tests/distributed/test_sharding_gpu.py; on CPUs, too
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import relative_error
from model_helpers import tiny_config
from sharding_run import whole
from torch.distributed.device_mesh import init_device_mesh

from gka import GKAForCausalLM
from gka.distributed import shard_model, tensor_parallel

SIZES = dict(hidden_size=256, intermediate_size=512, head_dim=64, initializer_range=None)


def make_model(device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return GKAForCausalLM(tiny_config("hybrid", **SIZES)).to(device, dtype)


def main() -> None:
    """Tensor parallelism in float32, forward, backward and generation; then FSDP with it in bfloat16."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    processes = dist.get_world_size()
    mesh = init_device_mesh(device, (processes // 2, 2), mesh_dim_names=("dp_shard", "tp"))
    rows = torch.randint(1, 61, (4, 150), generator=torch.Generator().manual_seed(0)).to(device)
    alone = make_model(device, torch.float32)
    split: Any = tensor_parallel(make_model(device, torch.float32), mesh["tp"])
    for model in (alone, split):
        model(rows, labels=rows).loss.backward()
    found: dict[str, Any] = {
        name: relative_error(whole(x.grad), alone.get_parameter(name).grad) for name, x in split.named_parameters()
    }
    asked: dict[str, Any] = dict(max_new_tokens=8, do_sample=False)
    same = torch.equal(split.eval().generate(rows, **asked), alone.eval().generate(rows, **asked))
    both: Any = shard_model(make_model(device, torch.float32), mesh, param_dtype=torch.bfloat16).train()
    optimizer = torch.optim.AdamW(both.parameters(), lr=1e-3, fused=True)
    losses = []
    for _ in range(5):
        loss = both(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seen = {"gradients": found, "tokens": same, "losses": losses}
    Path(sys.argv[1], f"seen {dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
