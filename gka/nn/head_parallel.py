"""Tensor parallelism of a layer by heads, a style for PyTorch's `parallelize_module`.

    out = sum_r layer_r(x)      layer_r: heads r H / n to (r + 1) H / n, and their columns of the output projection

A process has the rows of the projections, convolutions, A_log and dt_bias that belong to its heads. Heads do not
see each other, so the layer needs one sum over processes forward (its output) and one backward (the gradient of
its input). The weight of the output norm is whole on every process, and its gradient is the sum over processes.

Legend: H query heads, Hk key/value heads, n processes of the mesh.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .decay import REST, UNDECAYED
from .layer import GatedKalmaNet
from .local_parts import LocalParts
from .projections import CONVOLUTIONS, PROJECTIONS
from .short_conv import ShortConv

_NORM, _OUT = "o_norm.weight", "o_proj.weight"


class HeadParallel(ParallelStyle):
    """Splits the heads of a `GatedKalmaNet` over the processes of a mesh of one dim.

        parallelize_module(model, mesh, {"layers.*.gka": HeadParallel()})

    All processes of the mesh call the layer with the same input and get the same output. States and caches have
    the heads of the process. The names of the parameters stay; they are DTensors.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, GatedKalmaNet):
            raise TypeError(f"module is a {type(module).__name__}; expected a GatedKalmaNet")
        split_heads(module, device_mesh, self.src_data_rank)
        return module


def split_heads(layer: GatedKalmaNet, mesh: DeviceMesh, src_data_rank: int | None = 0) -> None:
    """Leave this process the part of a layer that belongs to its heads.

    Args:
        layer: a layer with plain parameters, on any device; it is changed.
        mesh: the processes, in one dim.
        src_data_rank: the process of the mesh whose weights all get a part of; None if all have the same.

    Raises:
        ValueError: the layer is split already; its heads or key/value heads are no multiple of the processes; it
            has kv_proj_rank, or parameters that are not the layer's, such as those of an adapter.
    """
    _check(layer, mesh)
    placements = _placements(layer)
    for name, placement in placements.items():
        place_parameter(layer, name, mesh, placement, src_data_rank)
    n = mesh.size()
    layer.num_heads, layer.num_kv_heads = layer.num_heads // n, layer.num_kv_heads // n
    for name in (*PROJECTIONS, *CONVOLUTIONS):
        part = getattr(layer, name)
        if isinstance(part, ShortConv):
            part.in_channels = part.out_channels = part.groups = part.groups // n
        elif part is not None:
            part.out_features //= n
    layer.o_proj.in_features //= n
    parts = LocalParts.of(layer)
    parts.partial = parts.summed[_NORM] = mesh
    parts.sliced.update({name + REST: mesh for name in UNDECAYED})


def place_parameter(
    module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement, src_data_rank: int | None = 0
) -> None:
    """Make a parameter of a module, by its name with dots, a DTensor."""
    path, _, leaf = name.rpartition(".")
    owner, whole = module.get_submodule(path), module.get_parameter(name)
    source = None if whole.is_meta else src_data_rank
    sharded = distribute_tensor(whole.detach(), mesh, [placement], src_data_rank=source)
    owner.register_parameter(leaf, nn.Parameter(sharded, requires_grad=whole.requires_grad))


def _placements(layer: GatedKalmaNet) -> dict[str, Placement]:
    """How the processes share each parameter of the layer."""
    by_row = {f"{part}.{leaf}" for part in (*PROJECTIONS, *CONVOLUTIONS) for leaf in ("weight", "bias")}
    known: dict[str, Placement] = {name: Shard(0) for name in (*UNDECAYED, *by_row)}
    known |= {_NORM: Replicate(), _OUT: Shard(1)}
    names = [name for name, _ in layer.named_parameters()]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"the layer has the parameters {unknown}; expected its own alone, without adapters")
    return {name: known[name] for name in names}


def _check(layer: GatedKalmaNet, mesh: DeviceMesh) -> None:
    if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
        raise ValueError("the parameters of the layer are sharded already; split its heads once, and before FSDP")
    if layer.proj_k is not None:
        raise ValueError(
            f"kv_proj_rank is {layer.proj_k.linearA.out_features}; expected None for tensor parallelism: the map "
            "reads all key/value heads for each query head"
        )
    for name in ("num_heads", "num_kv_heads"):
        if getattr(layer, name) % mesh.size():
            raise ValueError(
                f"{name} is {getattr(layer, name)}; expected a multiple of the {mesh.size()} processes that share "
                "the heads"
            )
