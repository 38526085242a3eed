"""Decoding on a CPU by torch.compile: the model's step of one token, compiled once, behind `generate`.

`generate(compile_config=CompileConfig())` asks for it. transformers itself compiles only for a static
cache on an accelerator. Prompts go to the model as it is, since their many lengths would be compiled one by one. A
step in PyTorch is limited by its many small operators; compiled they are a few loops in C++ and the products.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic

from .cache_name import CACHE, OLD
from .length import counting_outside

DEVICE = "cpu"
_KEPT = "_compiled_step"


class CompiledDecoding:
    """The model for one call of `generate`, except that steps of one token are compiled.

    Args:
        model: the model.
        compile_config: transformers' `CompileConfig`, options of torch.compile.
    """

    def __init__(self, model: Any, compile_config: Any) -> None:
        self._model, self._step = model, _step_of(model, compile_config.to_dict())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        ids, cache = inputs.get("input_ids"), inputs.get(CACHE, inputs.get(OLD))
        if ids is None or ids.shape[1] != 1 or cache is None or int(cache.get_seq_length()) < 2:
            return self._model(**inputs)  # torch.compile makes a graph of its own for each size of 0 or 1
        with counting_outside(cache, 1):
            lengths = [(inputs.get("attention_mask"), 1)]
            lengths += [(getattr(layer, name, None), 2) for layer in cache.layers for name in ("keys", "values")]
            for tensor, dim in lengths:
                if isinstance(tensor, Tensor) and tensor.dim() > dim:
                    maybe_mark_dynamic(tensor, dim)  # else the first graph is for one length alone
            return self._step(**inputs)


class _CompiledStep:
    """A compiled model, kept by the model. A copy of the model, or one from a file, has None in its place."""

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        self.options, self.run = options, torch.compile(model.__call__, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _step_of(model: Any, options: dict[str, Any]) -> Callable[..., Any]:
    """The compiled model, that of the last call if the options of torch.compile are the same."""
    kept = vars(model).get(_KEPT)
    if kept is None or kept.options != options:
        kept = vars(model)[_KEPT] = _CompiledStep(model, options)
    run: Callable[..., Any] = kept.run
    return run


def is_asked_for(model: Any, config: Any, cache: Any) -> bool:
    """Whether a call of `generate` with this configuration and cache shall compile its steps here."""
    return (
        model.device.type == DEVICE
        and cache is not None
        and config is not None
        and config.compile_config is not None
        and not config.disable_compile
    )


def decode_compiled(method: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a loop of transformers' `generate` with compiled steps; the arguments are those of `decode`."""
    config = copy.copy(kwargs["generation_config"])
    decoding = CompiledDecoding(model, config.compile_config)
    config.compile_config = None  # transformers would warn that it does not compile
    return method(decoding, *args, **{**kwargs, "generation_config": config})
