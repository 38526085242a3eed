"""Tensor parallelism of a model: its matrices are split over the processes of a mesh, by `parallelize_module`.

    layer                         by rows (outputs)               by columns (inputs)     whole, gradient summed
    GKA layer, by heads           q, k, v, g, a, b, alpha,        o                       norm of the output
                                  convolutions, A_log, dt_bias
    softmax attention, by heads   q, k, v                         o                       norms of q and k
    feed-forward                  gate, up                        down
    embedding, lm_head            vocabulary

All other parameters, norms above all, are whole on every process, and so are the hidden states.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from ..hf.block import SoftmaxAttention
from ..nn.head_parallel import HeadParallel, place_parameter
from ..nn.layer import GatedKalmaNet
from ..nn.local_parts import LocalParts, arrived


class Whole(ParallelStyle):
    """Parameters that every process has whole, as DTensors.

    Args:
        summed: whether each process sees other heads, so that the gradient is the sum over processes.
    """

    def __init__(self, summed: bool = False) -> None:
        super().__init__()
        self.summed = summed

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        parts = LocalParts.of(module)
        for name, _ in list(module.named_parameters(recurse=False)):
            place_parameter(module, name, device_mesh, Replicate(), self.src_data_rank)
            if self.summed:
                parts.summed[name] = device_mesh
        return module


class Arrived(ParallelStyle):
    """Another style, after which the output is a plain tensor.

    PyTorch's styles return a tensor that waits for its values when it is used. A compiled function that takes it
    gives it no gradient, or a wrong one (torch 2.13).
    """

    def __init__(self, style: ParallelStyle) -> None:
        super().__init__()
        self.style = style

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.style.src_data_rank = self.src_data_rank
        self.style._apply(module, device_mesh)
        module.register_forward_hook(_arrive)
        return module


def _arrive(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return arrived(output)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Split the matrices of a model over the processes of a mesh.

        mesh = init_device_mesh("cuda", (2,), mesh_dim_names=("tp",))
        model = tensor_parallel(GKAForCausalLM(config), mesh)

    Every process calls the model with the same tokens and gets the same logits and loss. The result is that of the
    whole model, up to rounding. The weights are those of the first process of the mesh, and move to the mesh's
    device. A cache has the heads of the process. Then shard over other processes by `shard_model`, and make the
    optimiser last.

    Args:
        model: a model of this library, a single `GatedKalmaNet`, or a module with such layers; it is changed.
        mesh: a mesh of one dim.

    Returns:
        The model.

    Raises:
        ValueError: the mesh has several dims; heads, key/value heads or the feed-forward block are no multiple of
            its size; a layer has kv_proj_rank, an adapter, or is sharded already.

    Warns of linear maps that stay whole: those of other mixers, and softmax attention of other models.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh has {mesh.ndim} dims; expected one, such as mesh['tp']")
    _check_sizes(model, mesh.size())
    tied = _tied(model)
    plan = parallel_plan(model)
    _tell_of_whole(model, plan)
    parallelize_module(model, mesh, plan)
    for name, first in tied.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path).register_parameter(leaf, model.get_parameter(first))
    return model


def parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """The style of each module of a model that has one, by its name: a plan for `parallelize_module`."""
    plan: dict[str, ParallelStyle] = {}
    layers: tuple[str, ...] = ()
    for name, module in model.named_modules():
        at = f"{name}." if name else ""
        if name.startswith(layers):
            continue  # a part of a layer, which is split as a whole
        if isinstance(module, GatedKalmaNet):
            plan[name] = HeadParallel()
            layers = (*layers, at)
        elif isinstance(module, SoftmaxAttention):
            plan[name] = _same_input()
            plan.update({f"{at}{one}_proj": ColwiseParallel() for one in "qkv"})
            plan[f"{at}o_proj"] = RowwiseParallel()
            plan.update({f"{at}{one}_norm": Whole(summed=True) for one in "qk"})
        elif isinstance(module, LlamaMLP):
            plan[name] = _same_input()
            plan.update({f"{at}{one}_proj": ColwiseParallel() for one in ("gate", "up")})
            plan[f"{at}down_proj"] = RowwiseParallel()
        elif isinstance(module, nn.Embedding):
            plan[name] = Arrived(RowwiseParallel(input_layouts=Replicate()))
        elif name == "lm_head":
            plan[name] = Arrived(ColwiseParallel(output_layouts=Replicate()))
        elif name not in plan and any(True for _ in module.parameters(recurse=False)):
            plan[name] = Whole()
    return plan


def _tell_of_whole(model: nn.Module, plan: dict[str, ParallelStyle]) -> None:
    """Warn of linear maps that stay whole, in layers of other packages."""
    styles = {name for name, style in plan.items() if isinstance(style, Whole)}
    if whole := [name for name in styles if isinstance(model.get_submodule(name), nn.Linear)]:
        warnings.warn(
            f"{len(whole)} linear maps stay whole on every process, such as {min(whole)}: tensor_parallel has no "
            "plan for their layers",
            stacklevel=3,
        )


def _same_input() -> PrepareModuleInput:
    """The projections share their input, and its gradient is summed over processes once, not for each."""
    return PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),))


def _check_sizes(model: nn.Module, processes: int) -> None:
    """All sizes, before anything is split."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("the parameters of the model are sharded already; split it once, and before FSDP")
    for module in model.modules():
        if isinstance(module, SoftmaxAttention):
            heads = {name: getattr(module.config, name) for name in ("num_attention_heads", "num_key_value_heads")}
        elif isinstance(module, LlamaMLP):
            heads = {"intermediate_size": module.intermediate_size}
        elif isinstance(module, GatedKalmaNet):
            heads = {"num_heads": module.num_heads, "num_kv_heads": module.num_kv_heads}
        else:
            continue
        for name, size in heads.items():
            if size % processes:
                raise ValueError(f"{name} is {size}; expected a multiple of the mesh's size, {processes}")


def _tied(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are another's tensor, such as lm_head's, and the name of that other."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[id(x)] for name, x in named if first.setdefault(id(x), name) != name}
