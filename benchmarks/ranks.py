"""Benchmarks on several ranks, which torchrun starts: one process group, and one result, written by rank 0."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import write_result


@contextmanager
def process_group(kind: str) -> Iterator[torch.device]:
    """The process group of all ranks; yields this rank's device, of kind "cuda" or "cpu"."""
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def write_by_first(name: str, rows: Iterable[dict[str, Any]], output: Path | None) -> None:
    """Every rank makes the rows of benchmark bench_NAME; rank 0 writes them."""
    command = f"torchrun --nproc_per_node {dist.get_world_size()} -m benchmarks.bench_{name}"
    if dist.get_rank() == 0:
        write_result(name, rows, " ".join([command, *sys.argv[1:]]), output)
        return
    for _ in rows:
        pass
