"""What vLLM loads: makes the models known to it, in each of its processes; more than one call changes nothing.

The models are imported only when vLLM serves one of them. A version of vLLM that is not supported is an error for
these models alone, at the start.
"""

from __future__ import annotations

import logging
from typing import Any

SUPPORTED = ("0.32", "0.33")  # minor series
ARCHITECTURE = "GKAForCausalLM"
BACKEND, BACKEND_CLASS = "GKA", "gka.vllm.metadata.GKABackend"
OPERATOR = "gka_mix_tokens"  # in the namespace vllm, as its own


def register() -> None:
    """Make model, attention backend and checks known to vLLM, and the configurations to transformers.

    If that fails, a warning says why. vLLM then starts without these models, because it may serve others.
    """
    from importlib import import_module

    problem = version_problem(installed_version())
    try:
        import_module("gka.hf")  # the configurations, for AutoConfig
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from .startup import Startup, refusal
    except ImportError as error:
        logging.getLogger("vllm.gka").warning("GKA models cannot be served: %s", problem or error)
        return
    MODELS_CONFIG_MAP[ARCHITECTURE] = Startup if problem is None else refusal(problem)
    ModelRegistry.register_model(ARCHITECTURE, f"gka.vllm.model:{ARCHITECTURE}")
    if problem is None:
        _register_backend()


def _register_backend() -> None:
    from vllm.config import CompilationConfig
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    if BACKEND not in MambaAttentionBackendEnum.__members__:
        register_backend(BACKEND, BACKEND_CLASS, is_mamba=True)
    split: Any = CompilationConfig._attention_ops  # where vLLM cuts a model into CUDA graphs
    if f"vllm::{OPERATOR}" not in split:
        split.append(f"vllm::{OPERATOR}")


def installed_version() -> str:
    """The version of vLLM, as it says itself."""
    import vllm

    return str(vllm.__version__)


def version_problem(version: str) -> str | None:
    """A sentence that names both versions if this one of vLLM is not supported, else None."""
    if ".".join(version.split(".")[:2]) in SUPPORTED:
        return None
    from .. import __version__

    series = " and ".join(f"{minor}.*" for minor in SUPPORTED)
    return f"vllm is {version}; gated-kalmanet {__version__} supports {series}: pip install 'gated-kalmanet[vllm]'"
