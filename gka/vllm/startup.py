"""Checks when vLLM starts with a model of this library, before it reads a weight; errors name what is refused."""

from __future__ import annotations

from typing import Any, NoReturn

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ..hf.mixers import OURS

STATE_DTYPES = ("auto", "float32", "bfloat16")


class Startup(VerifyAndUpdateConfig):
    """What vLLM calls with its configuration."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Check the model's configuration, with what --hf-overrides changed."""
        config = model_config.hf_config
        config.check()
        if config.mixer not in OURS:
            refuse("mixer", config.mixer, f"one of {OURS}: vLLM has no layer for others")
        if getattr(model_config, "quantization", None) is not None:
            refuse("quantization", model_config.quantization, "none: GKA models are not quantised in vLLM")

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check how the model is to be run."""
        config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
        if vllm_config.speculative_config is not None:
            refuse(
                "speculative_config", _method(vllm_config), "none: the state of a GKA layer cannot be rolled back"
            )
        if parallel.pipeline_parallel_size > 1:
            refuse("pipeline_parallel_size", parallel.pipeline_parallel_size, "1: use tensor_parallel_size")
        check_tensor_parallel(config, parallel.tensor_parallel_size)
        cache = vllm_config.cache_config
        if cache.mamba_ssm_cache_dtype not in STATE_DTYPES:
            refuse("mamba_ssm_cache_dtype", cache.mamba_ssm_cache_dtype, f"one of {', '.join(STATE_DTYPES)}")
        if cache.mamba_ssm_cache_dtype == "bfloat16" and not config.use_forget_gate:
            refuse("mamba_ssm_cache_dtype", "bfloat16", "float32 for a model without decay (docs/reliability.md)")


def _method(vllm_config: Any) -> Any:
    return getattr(vllm_config.speculative_config, "method", None)


def check_tensor_parallel(config: Any, ranks: int) -> None:
    """Raise ValueError unless the heads of a GKAConfig can be shared by so many processes."""
    if ranks == 1:
        return
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % ranks:
        refuse("tensor_parallel_size", ranks, f"a divisor of num_attention_heads, {heads}")
    if kv_heads % ranks and ranks % kv_heads:
        refuse("tensor_parallel_size", ranks, f"a divisor or a multiple of num_key_value_heads, {kv_heads}")
    if config.kv_proj_rank is not None and kv_heads % ranks:
        refuse("tensor_parallel_size", ranks, f"a divisor of num_key_value_heads, {kv_heads}, with kv_proj_rank")


def refusal(problem: str) -> type[VerifyAndUpdateConfig]:
    """A class whose check says that a model cannot be served."""

    class Refusal(VerifyAndUpdateConfig):
        """Refuses every model of this library."""

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            raise ValueError(problem)

    return Refusal


def refuse(name: str, value: Any, expected: str) -> NoReturn:
    """Raise ValueError in the form of all errors of this library."""
    raise ValueError(f"{name} is {value!r}; expected {expected}")
