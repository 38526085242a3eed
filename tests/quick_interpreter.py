"""Triton's interpreter without work that comes to nothing; what it computes stays the same to the bit.

Launching a kernel replaces what `triton.language` holds by what NumPy computes. The interpreter does so once more
wherever one function of a kernel calls another: it goes through all names of the language, which takes longer than
the call. Here that is done once a launch for every module of kernels. It also works out whether sums and products
of integers overflow, for assertions that it then leaves out unless it debugs, as the compiler does; the compiler
does not work it out either.
"""

from __future__ import annotations

import dataclasses
from typing import Any


def install() -> None:
    """Change the interpreter of this process."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)

    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()  # modules, by their globals, in which the language is replaced in this launch

    def replace_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in done:
            return None
        done.add(module)
        return replace(function)

    def launch_anew(self: Any, *arguments: Any, **named: Any) -> Any:
        done.clear()
        try:
            return launch(self, *arguments, **named)
        finally:
            done.clear()

    interpreter._patch_lang = replace_once
    interpreter.GridExecutor.__call__ = launch_anew
