"""The name of a model's cache in transformers: `cache` from 5.24 on, `past_key_values` before.

`forward` of the models accepts both names. Outputs, and arguments of `generate`, use the name of the installed
transformers. From 5.24 on, transformers also accepts the old name.

Delete this file when transformers 5.24 is the oldest supported version, at the latest on 1 July 2027; `cache`
stays.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from transformers.modeling_outputs import BaseModelOutputWithPast

OLD, NEW = "past_key_values", "cache"
CACHE = NEW if NEW in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)} else OLD


def named(cache: Any) -> dict[str, Any]:
    """The cache as a keyword argument of transformers' functions and outputs."""
    return {CACHE: cache}


_Function = TypeVar("_Function", bound=Callable[..., Any])


def takes_cache(function: _Function) -> _Function:
    """Let a method with an argument `past_key_values` also accept it as `cache`.

    transformers reads the signature of the method; it has the name of the installed transformers.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if NEW in kwargs:
            given = kwargs.pop(NEW)
            if given is not None and kwargs.get(OLD) is not None:
                raise ValueError(f"{OLD} and {NEW} are both given; they are two names of one argument")
            kwargs[OLD] = kwargs.get(OLD) if given is None else given
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    parameters = [p.replace(name=CACHE) if p.name == OLD else p for p in signature.parameters.values()]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return cast("_Function", call)
