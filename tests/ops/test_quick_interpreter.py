"""The interpreter of the tests computes what Triton's own does, to the bit."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import quick_interpreter
import torch
from decode_helpers import StepCase, call_step, step_arguments
from helpers import Case, converted, make_inputs, run
from tiny_run import run_process
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, kernels are not interpreted"),
    pytest.mark.skipif(
        not quick_interpreter.is_made_for_this(), reason="not made for the Triton that is installed"
    ),
]
CASES: dict[str, tuple[torch.dtype, tuple[int, ...], Case]] = {
    "packed": (torch.float32, (3, 2), Case(lengths=(2, 0, 17), D=7, V=3, H=1, packed=True)),
    "bfloat16": (torch.bfloat16, (3, 2), Case(lengths=(5,), H=1, D=12, V=20, normalize_qk=True)),
    "float16": (torch.float16, (2,), Case(lengths=(5,), H=1, D=7, V=9)),
    "without a solve": (torch.float32, (), Case(lengths=(9,), H=1, D=6, V=5)),
    "several spans": (torch.bfloat16, (), Case(lengths=(50, 0, 3), H=1, D=8, V=4, packed=True)),
}


def outcomes() -> dict[str, Tensor]:
    """What the kernels give: of the op and the short convolution, with gradients, and of a step."""
    from gka.ops.triton import call as triton_call
    from gka.ops.triton import step as triton_step
    from gka.ops.triton.conv import short_convs

    found: dict[str, Tensor] = {}
    for kind, (dtype, solver_steps, case) in CASES.items():
        arguments = converted(make_inputs(case), dtype)
        if not solver_steps:
            arguments["S_kk"] = None
        every = 2 if kind == "several spans" else triton_call.EDGE_EVERY
        with mock.patch.object(triton_call, "EDGE_EVERY", every):
            out = run(arguments, backend="triton", chunk_size=16, solver_steps=solver_steps)
        found |= {f"{kind} {name}": value.detach() for name, value in out.items()}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = step_arguments(StepCase(D=5, V=9, dtype=dtype))
        o, state = call_step(triton_step.gated_kalmanet_step, given, inplace=False)
        found |= {f"step {dtype} {name}": value for name, value in {"o": o, **state._asdict()}.items()}
        x = make_inputs(Case(lengths=(11,), D=5), torch.float32)["q"].detach().flatten(2).to(dtype)
        x.requires_grad_()
        (y,) = short_convs([x], torch.linspace(-1, 1, 4 * x.shape[2]).view(-1, 4).to(dtype))
        y.backward(y.detach())
        found |= {f"convolution {dtype}": y.detach(), f"convolution {dtype} dx": x.grad}
    return found


def conversions() -> dict[str, Tensor]:
    """Every bfloat16 number in float32, and numbers of every exponent back, infinity and NaN among them."""
    from triton.language import core
    from triton.runtime import interpreter

    halves = np.arange(1 << 16, dtype=np.uint16)
    wholes = (halves.astype(np.uint32) << 16) | np.random.default_rng(0).integers(1 << 16, size=1 << 16).astype(
        "uint32"
    )
    found: dict[str, Tensor] = {}
    for source, target, bits, exponent, rest in (
        (core.bfloat16, core.float32, halves, 0x7F80, 0x7F),
        (core.float32, core.bfloat16, np.append(wholes, [0, 1 << 31]).astype("uint32"), 0x7F800000, 0x7FFFFF),
    ):
        subnormal = ((bits & exponent) == 0) & ((bits & rest) != 0)
        for name, given in (("normal", bits[~subnormal]), ("subnormal", bits[subnormal])):
            result = interpreter._convert_float(given.reshape(2, -1), source, target, None)
            found[f"{name} {source} as {result.dtype}"] = torch.tensor(result.astype(np.int64))
    return found


def as_bytes(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8)


def test_it_is_triton_s_own_to_the_bit(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch, test_quick_interpreter\n"
        "from triton.runtime import interpreter\n"
        "torch.set_num_threads(1)\n"
        "found = test_quick_interpreter.outcomes() | test_quick_interpreter.conversions()\n"
        f"torch.save(found, {str(tmp_path / 'outcomes')!r})\n"
        "assert interpreter._patch_lang.__module__ == interpreter.__name__  # it is Triton's own\n"
    )
    from triton.runtime import interpreter

    assert interpreter._patch_lang.__module__ == quick_interpreter.__name__
    run_process(launcher=("-c", code), env={"TRITON_INTERPRET": "1"})
    theirs, ours = torch.load(tmp_path / "outcomes"), outcomes()
    assert all(value.isfinite().all() for value in ours.values())
    ours |= conversions()
    assert ours.keys() == theirs.keys()
    differ = [name for name in theirs if not torch.equal(as_bytes(ours[name]), as_bytes(theirs[name]))]
    assert not differ, differ
