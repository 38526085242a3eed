"""Description of the machine, the versions and the command, for every JSON file of results."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from typing import Any

import torch

from ..training.errors import UserError

_PACKAGES = (
    "gated-kalmanet",
    "torch",
    "transformers",
    "accelerate",
    "triton",
    "flash-linear-attention",
    "mamba-ssm",
    "vllm",
    "numpy",
)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads, GPU, its driver, and operating system."""
    gpu = driver = None
    if torch.cuda.is_available():
        gpu, driver = torch.cuda.get_device_name(), _driver()
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "driver": driver,
        "system": platform.platform(),
    }


def check_compiler() -> None:
    """UserError if torch.compile finds no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):  # RuntimeError: on Windows
        raise UserError(
            "--compile needs a C++ compiler: torch.compile takes g++, or that of the variable CXX; none runs"
        ) from None


def _driver() -> str | None:
    """Version of the NVIDIA driver as reported by nvidia-smi; None if there is none."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.split("\n")[0].strip() or None


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change results."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_commit() -> str:
    """The commit: GKA_COMMIT if it is set, else the answer of git for the checkout of this file."""
    given = os.environ.get("GKA_COMMIT")
    if given:
        return given
    folder, name = os.path.split(os.path.abspath(__file__))
    try:
        # An installed package may lie in the checkout of another project; that project does not track this file.
        kept = subprocess.run(["git", "ls-files", name], capture_output=True, text=True, cwd=folder).stdout.strip()
        command = ["git", "describe", "--always", "--dirty"]
        found = subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout.strip() if kept else ""
    except FileNotFoundError:  # no git
        return "not a git checkout"
    return found or "not a git checkout"


def describe_command() -> str:
    """The command line of this process, in a form for a shell; for a process of torchrun with its launcher."""
    program, *arguments = sys.argv
    name = os.path.basename(program)
    if name == "__main__.py":
        package, processes = os.path.basename(os.path.dirname(program)), os.environ.get("LOCAL_WORLD_SIZE")
        launcher = ["python"] if processes is None else ["torchrun", "--nproc_per_node", processes]
        return shlex.join([*launcher, "-m", package, *arguments])
    return shlex.join([name, *arguments])


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()
