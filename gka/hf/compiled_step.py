"""Decoding on a CPU by torch.compile: the model's step of one token, compiled once, behind `generate`.

`generate(compile_config=CompileConfig())` asks for it. transformers itself compiles only for a static
cache on an accelerator. Prompts go to the model as it is, since their many lengths would be compiled one by one. A
step in PyTorch is limited by its many small operators; compiled they are a few loops in C++ and the products.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._dynamo import maybe_mark_dynamic

from .cache_name import CACHE, OLD
from .length import counting_outside

DEVICE = "cpu"


class CompiledDecoding:
    """The model for one call of `generate`, except that steps of one token are compiled.

    Args:
        model: the model.
        compile_config: transformers' `CompileConfig`, options of torch.compile.
    """

    def __init__(self, model: Any, compile_config: Any) -> None:
        self._model, self._step = model, model.get_compiled_call(compile_config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        ids, cache = inputs.get("input_ids"), inputs.get(CACHE, inputs.get(OLD))
        if ids is None or ids.shape[1] != 1 or cache is None or int(cache.get_seq_length()) < 2:
            return self._model(**inputs)
        lengths = [(inputs.get("attention_mask"), 1)]
        lengths += [
            (part, 2)
            for layer in cache.layers
            for part in (getattr(layer, "keys", None), getattr(layer, "values", None))
        ]
        for tensor, dim in lengths:
            if isinstance(tensor, Tensor) and tensor.dim() > dim:
                maybe_mark_dynamic(tensor, dim)  # else the first graph is for one length alone
        with counting_outside(cache, 1):
            return self._step(**inputs)


def is_asked_for(model: Any, config: Any) -> bool:
    """Whether a call of `generate` with this configuration shall compile its steps here."""
    return (
        model.device.type == DEVICE
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
