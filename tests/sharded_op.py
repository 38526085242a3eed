"""What the processes of tests/distributed compute: the op on shared rows, compared with the op of one process."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from helpers import INPUTS, Case, converted, doubled, make_inputs, relative_error, run
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.checkpoint import checkpoint

import gka
from gka.distributed import ContextParallel, fold, gated_kalmanet

Arrays = dict[str, np.ndarray[Any, Any]]


def inputs(case: Case, faded: bool = False, solves: bool = True) -> dict[str, Any]:
    """The inputs of a case; if `faded`, every seventh token forgets the past; without a solve there is no S_kk."""
    arguments = make_inputs(case)
    if faded:
        g = arguments["g"].detach()
        arguments["g"] = g.index_fill(1, torch.arange(3, g.shape[1], 7), -torch.inf)
    if not solves:
        arguments["S_kk"] = None
    return arguments


def arrays(outputs: dict[str, Tensor]) -> Arrays:
    """What travels between processes."""
    return {name: x.detach().numpy() for name, x in outputs.items()}


def run_shared(
    arguments: dict[str, Any], context: ContextParallel, op: Any = gated_kalmanet, **options: Any
) -> Any:
    """`helpers.run` with this rank's part of the inputs: global outputs, and the mean over ranks of the gradients.

    The loss of every rank is that of the global outputs, so the mean is the gradient in one process.
    """
    shard = context.shard(arguments["q"].shape[1], arguments.get("cu_seqlens"))

    def function(*tensors: Tensor | None, cu_seqlens: Tensor | None, **settings: Any) -> Any:
        o, final = op(*(None if x is None else shard.take(x) for x in tensors), shard=shard, **settings)
        return shard.gather(o), final

    outputs = run(arguments, function, **options)
    for name, x in outputs.items():
        if name.split()[-1][1:] in INPUTS:
            total = x.contiguous()
            dist.all_reduce(total, group=context.group)
            outputs[name] = total / context.size
    return outputs


def errors(outputs: dict[str, Tensor], reference: Arrays) -> dict[str, float]:
    """Relative error of each output and gradient."""
    assert outputs.keys() == reference.keys()
    return {name: relative_error(outputs[name], torch.from_numpy(reference[name])) for name in reference}


def compare(
    group: Any, case: Case, layout: Any, reference: Arrays, kind: dict[str, Any], options: dict[str, Any]
) -> dict[str, float]:
    """Errors of the shared op in float64."""
    return errors(run_shared(inputs(case, **kind), ContextParallel(group, layout), **options), reference)


def compare_gradients_of(group: Any, case: Case, layout: Any, names: list[str]) -> dict[str, float]:
    """Errors of the gradients of some inputs, where no other input has one."""
    arguments = make_inputs(case)
    leaves = {name: x.detach().requires_grad_(name in names) for name, x in arguments.items() if name in INPUTS}
    context = ContextParallel(group, layout)
    shard = context.shard(leaves["q"].shape[1])
    state = (leaves["S_kk"], leaves["S_kv"])
    mine, _ = gated_kalmanet(*(shard.take(leaves[name]) for name in INPUTS[:6]), shard=shard, initial_state=state)
    alone, _ = gka.ops.gated_kalmanet(*(leaves[name] for name in INPUTS[:6]), initial_state=state)
    wanted = [leaves[name] for name in names]
    found = [x.contiguous() for x in torch.autograd.grad(mine.square().sum(), wanted)]
    expected = torch.autograd.grad(alone.square().sum(), wanted)
    for x in found:
        dist.all_reduce(x, group=group)
    return {name: relative_error(x, y) for name, x, y in zip(names, found, expected, strict=True)}


def compare_broken(group: Any, case: Case, layout: Any, reference: Arrays) -> dict[str, float]:
    """The same without the gradient of the sums of g, which later ranks send back."""
    with mock.patch.object(fold, "sums_before", lambda x, dim: torch.zeros_like(x)):
        return compare(group, case, layout, reference, {}, {})


def compare_wrapped(group: Any, case: Case, reference: Arrays, how: str) -> dict[str, float]:
    """The same under torch.compile, gradient checkpointing or autocast."""

    def checkpointed(*tensors: Any, **settings: Any) -> Any:
        return checkpoint(gated_kalmanet, *tensors, use_reentrant=False, **settings)

    def under_autocast(*tensors: Any, **settings: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return gated_kalmanet(*tensors, **settings)

    ops: dict[str, Callable[..., Any]] = {
        "checkpoint": checkpointed,
        "autocast": under_autocast,
        "compile": torch.compile(gated_kalmanet, fullgraph=True, backend="aot_eager"),
    }
    return errors(run_shared(inputs(case), ContextParallel(group), ops[how]), reference)


def compare_16_bits(group: Any, case: Case, dtype: torch.dtype, reference: Arrays) -> list[dict[str, float]]:
    """Errors of the shared op and of the op of one process with inputs of 16 bits."""
    arguments = converted(make_inputs(case), dtype)
    return [errors(run_shared(arguments, ContextParallel(group)), reference), errors(run(arguments), reference)]


def rounded_reference(case: Case, dtype: torch.dtype) -> Arrays:
    """What float64 makes of the rounded inputs."""
    return arrays(run(doubled(converted(make_inputs(case), dtype))))


def count_collectives(group: Any, case: Case, final_state: bool) -> list[int]:
    """Collectives of a forward pass and of its backward pass, from o or from the final states."""
    arguments = make_inputs(case)
    shard = ContextParallel(group).shard(arguments["q"].shape[1])
    tensors = [shard.take(arguments[name]) for name in INPUTS[:6]]
    gated_kalmanet(*tensors, shard=shard, output_final_state=final_state)  # the hosts compare the first call
    with CommDebugMode() as forward:
        o, final = gated_kalmanet(*tensors, shard=shard, output_final_state=final_state)
    with CommDebugMode() as backward:
        (o if final is None else final.S_kv).sum().backward()
    return [forward.get_total_counts(), backward.get_total_counts()]


def shard_of(group: Any, T: int, cu_seqlens: list[int] | None, layout: Any, width: int) -> dict[str, Any]:
    """A rank's plan, and what it does to a tensor of T numbered tokens and to its gradient."""
    context = ContextParallel(group, layout)
    shard = context.shard(T, cu_seqlens if context.rank else torch.tensor(cu_seqlens))
    x = torch.arange(T * width, dtype=torch.float64).view(width, T).requires_grad_()
    whole = shard.gather(shard.take(x).square())
    (whole * torch.arange(T)).sum().backward()
    return {
        "segments": shard.segments,
        "sequences": shard.sequences,
        "positions": shard.positions("cpu").tolist(),
        "tokens": shard.take(torch.arange(T), dim=0).tolist(),
        "whole": whole.detach().numpy(),
        "gradient": x.grad.numpy(),  # type: ignore[union-attr]
        "kept": shard.cu_seqlens("cpu") is shard.cu_seqlens("cpu"),
    }


def refusals(group: Any, layout: Any) -> dict[str, str]:
    """The messages of calls that do not fit, by what is wrong."""
    context = ContextParallel(group, layout)
    shard, packed = context.shard(8), context.shard(8, [0, 3, 8])
    good = {name: x for name, x in make_inputs(Case(lengths=(8,))).items() if name in INPUTS[:6]}
    mine = {name: shard.take(x) for name, x in good.items()}
    mesh = DeviceMesh("cpu", torch.arange(dist.get_world_size()).view(2, -1), mesh_dim_names=("dp", "cp"))
    calls: dict[str, Callable[[], Any]] = {
        "layout": lambda: ContextParallel(group, "ring"),  # type: ignore[arg-type]
        "mesh": lambda: ContextParallel(mesh),
        "group": lambda: ContextParallel("cp"),  # type: ignore[arg-type]
        "T": lambda: context.shard(-1),
        "kind of T": lambda: context.shard(8.0),  # type: ignore[arg-type]
        "edges": lambda: context.shard(8, [0, 5, 3, 8]),
        "kind of edges": lambda: context.shard(8, [0, 2.5, 8]),  # type: ignore[list-item]
        "local tokens": lambda: gated_kalmanet(**good, shard=shard),
        "take": lambda: shard.take(good["q"][:, 1:]),
        "gather": lambda: shard.gather(good["q"]),
        "shard": lambda: gated_kalmanet(**mine, shard=context),  # type: ignore[arg-type]
        "rows": lambda: gated_kalmanet(**{n: x.expand(2, *x.shape[1:]) for n, x in mine.items()}, shard=packed),
        "cu_seqlens": lambda: gated_kalmanet(**mine, shard=shard, cu_seqlens=torch.tensor([0, 8])),
        "state": lambda: gated_kalmanet(**mine, shard=packed, initial_state=(None, torch.zeros(1, 2, 16, 16))),
        "transform": lambda: torch.func.grad(lambda g: gated_kalmanet(**{**mine, "g": g}, shard=shard)[0].sum())(
            mine["g"]
        ),
        "pickle": lambda: pickle.dumps(context),
    }
    if layout == "zigzag":
        calls["T for zigzag"] = lambda: context.shard(9)
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "no error"
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    assert copy.deepcopy(context).group is context.group and ContextParallel(mesh["cp"]).size == 2
    return found
