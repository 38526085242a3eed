"""Launches of compiled kernels: what `prepared` launches is what Triton's own launcher would.

Stand-ins for compiler and driver write down for what a kernel is compiled and what is launched.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_forked

ROOT = Path(__file__).parent.parent.parent

SCRIPT = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

launched = []

class Compiled(triton.compiler.CompiledKernel):  # in place of one, with what it would be compiled for
    def __init__(self, source, target, options, *others):
        self.src, self.name, self.function, self.packed_metadata = source, "", None, None
        self.module, self._module_pid = "loaded", None
        made_of = (source.signature, source.attrs, source.constants, sorted(options.items()), Driver.device)
        self._run = lambda *given: note(str(made_of), *given)

    def __del__(self):
        pass

def note(made_of, x, y, z, stream, function, packed, metadata, enter, exit, *values):
    addresses = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values]
    launched.append((made_of, x, y, z, stream, addresses))

class Driver:
    device = 0
    get_current_device = lambda self: self.device
    get_current_stream = lambda self, device: 7 + device
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
torch.Tensor.get_device = lambda self: Driver.device
triton.compiler.compile = Compiled
from gka.ops.triton.kernels.conv import convolve
from gka.ops.triton.launch import launch

room = torch.zeros(64)
given = dict(
    x0_ptr=room, x1_ptr=room, x2_ptr=room, weight_ptr=room, place_ptr=None, front_ptr=None,
    y0_ptr=room, y1_ptr=room, y2_ptr=room, T=9, C0=17, C1=0, C2=5,
    W=2, PACKED=False, FRONT=False, SPAN=8, R=2, BC=32, num_warps=1, num_stages=1,
)
changes = [
    {}, {"x0_ptr": room[32:]}, {"x0_ptr": room[1:]}, {"y0_ptr": room[1:]}, {"x0_ptr": room.bfloat16()},
    {"place_ptr": room.int(), "PACKED": True}, {"C0": 16}, {"C0": 18}, {"C0": 1}, {"C0": 2**40},
    {"T": 2**40}, {"T": 16}, {"W": 1}, {"num_warps": 2}, {"T": 10, "num_stages": 1},
]
for device in (0, 1):
    Driver.device = device
    for change in changes * 2:
        launch(convolve, 3, **{**given, **change})
        convolve.run(grid=(3,), warmup=False, enable_fp_fusion=True, **{**given, **change})
assert len(launched) == 4 * 2 * len(changes)
for ours, theirs in zip(launched[::2], launched[1::2], strict=True):
    assert ours == theirs, (ours, theirs)

again = launched[-2 * len(changes)::2]
launched.clear()
convolve.run = None  # everything was launched before: nothing goes through Triton's launcher
for change in changes:
    launch(convolve, 3, **{**given, **change})
launch(convolve, 0, **given)
assert launched == again
"""


def test_prepared_launches_are_those_of_triton() -> None:
    pytest.importorskip("triton", reason="Triton is made for Linux only")
    run_forked("-c", SCRIPT, folder=ROOT)
