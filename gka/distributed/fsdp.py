"""Sharding of a model over a mesh: FSDP2 by blocks, beside tensor and context parallelism on the same mesh.

parameters    a part on each process; a block's are gathered while it runs, in `param_dtype`
gradients     mean over the processes of FSDP, summed in `reduce_dtype`
decay         A_log and dt_bias, 2 H numbers a layer. Rounded to bfloat16 they would move the logits by 1.5%, so
              where blocks are gathered in fewer bits, they stay whole on each process, in their own dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate
from transformers.modeling_layers import GradientCheckpointingLayer

from ..nn.decay import UNDECAYED, DecayParameters
from ..nn.local_parts import LocalParts
from .models import MESH_DIM
from .plan import tensor_parallel

TENSOR, SHARD, REPLICATE = "tp", "dp_shard", "dp_replicate"
MESHES = ((SHARD,), (REPLICATE, SHARD), (SHARD, MESH_DIM))  # each also with TENSOR behind


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> nn.Module:
    """Shard a model over the processes of a mesh, each block by itself.

        mesh = init_device_mesh("cuda", (4, 2), mesh_dim_names=("dp_shard", "tp"))
        model = shard_model(GKAForCausalLM(config), mesh, param_dtype=torch.bfloat16)

    Processes that differ in "tp" or "cp" take the same sequences, others take different ones. Make the optimiser
    afterwards.

    Args:
        model: a model of this library, or another of transformers with GKA layers; it is changed.
        mesh: its dims are named "dp_shard" (parameters are split), optionally before it "dp_replicate" (groups
            that each have all parameters) or after it "cp" (processes share the tokens of a sequence; parameters
            are split over them too; call `parallelize` first), and last "tp" (heads are split, by
            `tensor_parallel`).
        param_dtype: dtype in which blocks compute; None means that of the parameters. The optimiser keeps theirs.
        reduce_dtype: dtype in which gradients are summed over processes; None means that of the parameters, and at
            least float32.
        reshard_after_forward: whether a block's gathered parameters are freed between forward and backward pass.

    Returns:
        The model, an FSDPModule.

    Raises:
        ValueError: the mesh has other dims, or "cp" and the model does not share its tokens; the model is sharded
            already; an error of `tensor_parallel`.
    """
    names = mesh.mesh_dim_names or ()
    data = tuple(name for name in names if name != TENSOR)
    if data not in MESHES or names not in (data, (*data, TENSOR)):
        raise ValueError(
            f"mesh has the dims {names}; expected 'dp_shard', optionally after 'dp_replicate' or before 'cp', and "
            "'tp' last"
        )
    if MESH_DIM in data and getattr(model, "shared_tokens", None) is None:
        raise ValueError("mesh has the dim 'cp' and the model does not share its tokens; call parallelize first")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("the model is sharded by FSDP already; expected one that is not")
    if TENSOR in names:
        tensor_parallel(model, mesh[TENSOR])
    apart = _rounded_decays(model, param_dtype)
    if reduce_dtype is None:
        reduce_dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    options: dict[str, Any] = {
        "mesh": _data_mesh(mesh, data),
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype),
        "reshard_after_forward": reshard_after_forward,
        "ignored_params": {parameter for _, _, parameter in apart},
    }
    for block in list(model.modules()):
        if isinstance(block, GradientCheckpointingLayer):  # transformers' base class of blocks, ours too
            fully_shard(block, **options)
    fully_shard(model, **options)
    if apart:
        _replicate(apart, _mesh_of(model.parameters()), options["mesh"])
    return model


def _data_mesh(mesh: DeviceMesh, data: tuple[str, ...]) -> DeviceMesh:
    """The mesh of FSDP: the dims of data; "dp_shard" and "cp" are one, for both split the parameters."""
    if len(data) == 1:
        return mesh[data[0]]
    return mesh[data]._flatten() if MESH_DIM in data else mesh[data]


Decays = list[tuple[DecayParameters, str, nn.Parameter]]


def _rounded_decays(model: nn.Module, param_dtype: torch.dtype | None) -> Decays:
    """The parameters of decays that FSDP would gather in another dtype than theirs."""
    layers = [module for module in model.modules() if isinstance(module, DecayParameters)]
    found = [(layer, name, layer._parameters.get(name)) for layer in layers for name in UNDECAYED]
    return [(layer, name, x) for layer, name, x in found if x is not None and param_dtype not in (None, x.dtype)]


def _mesh_of(parameters: Iterable[nn.Parameter]) -> DeviceMesh:
    """The mesh of FSDP's parameters: the largest, with a dim for tensor parallelism where there is one."""
    return max((x.device_mesh for x in parameters if isinstance(x, DTensor)), key=lambda mesh: mesh.ndim)


def _replicate(apart: Decays, mesh: DeviceMesh, data: DeviceMesh) -> None:
    """Make parameters DTensors that are whole over the data dims; their gradients are the means over them."""
    for layer, name, parameter in apart:
        split = parameter.placements if isinstance(parameter, DTensor) else ()
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        placements: list[Placement] = [Replicate()] * data.ndim + list(split)
        if not local.is_meta:
            local = local.to(mesh.device_type)
        whole = DTensor.from_local(local.detach(), mesh, placements, run_check=not local.is_meta)
        setattr(layer, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
        LocalParts.of(layer).averaged[name] = data
