"""Launches of kernels that are compiled already, without Triton's search for the compiled kernel.

`kernel.run` binds all arguments by name, finds out their types, writes the options into a string and looks the
compiled kernel up by it. For 40 arguments this takes longer than many kernels run. Here the first launch goes that
way, and the compiled kernel is kept for later launches with the same constants and the same kinds of arguments.
Kinds are at least as fine as what Triton compiles for: the type; the dtype of a tensor, and whether its address is
a multiple of 16; whether a whole number is 1, is a multiple of 16, needs more than 31 bits.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")  # of the compiler


class PreparedKernel:
    """A kernel with its compiled forms.

    Args:
        kernel: a function of `triton.jit` with more than one parameter and at least one constant.
    """

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self.kernel = kernel
        names = [parameter.name for parameter in kernel.params]
        constants = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
        self.in_order, self.constants = itemgetter(*names), itemgetter(*constants)
        self.variable = [place for place, name in enumerate(names) if name not in constants]
        self.known = {*names, *OPTIONS}
        self.compiled: dict[tuple[Any, ...], CompiledKernel] = {}

    def run(self, programs: int, named: dict[str, Any]) -> None:
        """Run `programs` programs, at least 1, on the current GPU.

        Args:
            programs: number of programs.
            named: all arguments of the kernel, and options of the compiler.
        """
        key, values, device = self._key_and_values(named)
        compiled = self.compiled.get(key)
        if compiled is not None:
            compiled[programs, 1, 1](*values, stream=driver.active.get_current_stream(device))
            return
        found = self.kernel.run(grid=(programs,), warmup=False, **named)
        is_known = named.keys() <= self.known and not self.kernel.pre_run_hooks
        if device >= 0 and is_known and isinstance(found, CompiledKernel):
            self.compiled[key] = found

    def _key_and_values(self, named: dict[str, Any]) -> tuple[tuple[Any, ...], list[Any], int]:
        """What decides on the compiled kernel; the arguments in order, with addresses for tensors; the GPU.

        The GPU is -1 without one.
        """
        device = -1
        values = list(self.in_order(named))
        key: list[Any] = [len(named), self.constants(named), *map(named.get, OPTIONS)]
        for place in self.variable:
            value = values[place]
            if isinstance(value, Tensor):
                device = value.get_device()
                values[place] = address = value.data_ptr()
                key.append((value.dtype, address & 15 == 0))
            elif type(value) is int:
                key.append("one" if value == 1 else (value & 15 == 0, value >> 31))
            else:
                key.append(type(value))
        key.append(device)
        return tuple(key), values, device
