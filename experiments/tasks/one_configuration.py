"""Kernels of other packages without a search for their fastest form.

Triton's autotuner compiles and times up to a hundred configurations of a kernel for every new shape. For a layer
of flash-linear-attention this takes one to three minutes a shape, in which no other training of the process can
make a step. Where a result is what a model learns, and not how fast, one configuration that runs will do.

Configurations with four warps are tried first, then those with two or eight. The first of a list often has one
warp; with that one MesaNet trained at a quarter of the speed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

_FAILED = [math.inf] * 3


@functools.cache
def take_one_configuration() -> None:
    """From now on, Triton's autotuner takes a likely configuration that compiles and fits, in the whole process.

    Nothing of it enters the autotuner's cache on disk.
    """
    from triton.runtime.autotuner import Autotuner

    prune, bench = Autotuner.prune_configs, Autotuner._bench

    def prune_configs(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.has_one, self.cache_results = False, False
        self.__dict__.pop("do_bench", None)  # of a search before
        return sorted(prune(self, *args, **kwargs), key=lambda config: abs(math.log2(config.num_warps / 4)))

    def _bench(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.has_one:
            return _FAILED
        times = bench(self, *args, **kwargs)
        self.has_one = math.isfinite(times[0])
        return times

    Autotuner.prune_configs, Autotuner._bench, Autotuner.do_bench = prune_configs, _bench, _run_once


def _run_once(_: Any, kernel_call: Callable[[], Any], **__: Any) -> list[float]:
    kernel_call()
    return [0.0] * 3
