"""A GKA layer in vLLM: projections by vLLM's layers, the tokens between them by `core.mix_tokens`.

vLLM compiles and captures the projections, gates and norm. What lies between, with the states, is one operator
that it does not look into, as for its own layers of this kind.

Legend: T tokens of a step, H query heads and Hk key/value heads of this process, D head dim, G number of gates.
"""

# Without annotations as strings: vLLM reads the types of the operator's arguments.
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from ..nn.gated_norm import GatedRMSNorm
from ..nn.projections import LowRank, expand_heads
from ..ops.triton.gates import gates_in_pytorch
from .core import Mixing, Pools, mix_tokens, rehearse
from .plugin import BACKEND, OPERATOR
from .states import conv_width, state_dtypes, state_shapes

GATES = {"a_proj": "use_forget_gate", "b_proj": "use_beta_gate", "alpha_proj": "use_alpha_connection"}


class GKALayer(nn.Module, MambaBase):
    """The layer `gka.nn.GatedKalmaNet` for vLLM, [T, hidden_size] -> [T, hidden_size].

    Args:
        config: the GKAConfig of the model.
        vllm_config: vLLM's configuration.
        prefix: the name of the layer in the model.
    """

    A_log: nn.Parameter  # [H] each, if the layer has a decay
    dt_bias: nn.Parameter

    def __init__(self, config: Any, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        self.config, self.vllm_config, self.prefix = config, vllm_config, prefix
        ranks, hidden, D = get_tensor_model_parallel_world_size(), config.hidden_size, config.head_dim
        H = config.num_attention_heads
        self.heads, self.kv_heads, self.head_dim = H // ranks, max(config.num_key_value_heads // ranks, 1), D
        self.solves = config.mixer == "gka"
        self.qkv_proj = QKVParallelLinear(
            hidden, D, H, config.num_key_value_heads, bias=False, prefix=f"{prefix}.qkv_proj"
        )
        copies = max(ranks // config.num_key_value_heads, 1)  # processes with the same key/value heads
        self.conv1d = _Convolutions(self.heads * D, self.kv_heads * D, copies, config)
        self.gates_proj = _Gates(hidden, self.heads, gates_of(config))
        for name in ("A_log", "dt_bias") if config.use_forget_gate else ():
            parameter = nn.Parameter(torch.empty(self.heads, dtype=torch.float32), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})
            self.register_parameter(name, parameter)
        self.g_proj = None
        if config.use_output_gate:
            self.g_proj = ColumnParallelLinear(hidden, H * D, bias=False, prefix=f"{prefix}.g_proj")
        self._add_maps()
        self.o_norm = GatedRMSNorm(D, config.rms_norm_eps)
        self.o_proj = RowParallelLinear(H * D, hidden, bias=False, prefix=f"{prefix}.o_proj")
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"prefix is {prefix!r}; expected a name that no other layer has")
        layers[prefix] = self
        self.kv_cache: tuple[Tensor, ...] = ()

    def _add_maps(self) -> None:
        """The maps from the key/value heads of all processes to keys and values of this one's query heads."""
        config, inner = self.config, self.heads * self.head_dim
        every, rank = config.num_key_value_heads, config.kv_proj_rank
        self.proj_k = None if rank is None else LowRank(every * self.head_dim, rank, inner)
        self.proj_v = None if rank is None else LowRank(every * self.head_dim, rank, inner)
        mixed = config.kv_learnable_residual
        self.k_rep = nn.Parameter(torch.empty(self.heads, every), requires_grad=False) if mixed else None
        self.v_rep = nn.Parameter(torch.empty(self.heads, every), requires_grad=False) if mixed else None
        of_heads = [
            self.k_rep,
            self.v_rep,
            *(x.linearB.weight for x in (self.proj_k, self.proj_v) if x is not None),
        ]
        for parameter in of_heads:
            if parameter is not None:
                set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size], in the dtype of the weights."""
        qkv, _ = self.qkv_proj(hidden_states)
        g, beta, alpha = self._gate_values(hidden_states)
        o = torch.empty(hidden_states.shape[0], self.heads, self.head_dim, dtype=qkv.dtype, device=qkv.device)
        getattr(torch.ops.vllm, OPERATOR)(qkv, g, alpha, beta, o, self.prefix)
        gate = None
        if self.g_proj is not None:
            gate = self.g_proj(hidden_states)[0].unflatten(1, (self.heads, self.head_dim))
        out, _ = self.o_proj(self.o_norm(o, gate).flatten(1))
        return out

    def _gate_values(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """g, beta and alpha, [T, H] float32 each; None for those that the layer does not have."""
        raw = self.gates_proj(x)
        A_log, dt_bias = (getattr(self, name, None) for name in ("A_log", "dt_bias"))
        three = (raw.get("a_proj"), raw.get("b_proj"), raw.get("alpha_proj"))
        return gates_in_pytorch(three, A_log, dt_bias, None, torch.float32)

    def mix(self, qkv: Tensor, g: Tensor | None, alpha: Tensor | None, beta: Tensor | None, out: Tensor) -> None:
        """Between the projections, for the requests of this step; a rehearsal while vLLM measures memory."""
        metadata = (get_forward_context().attn_metadata or {}).get(self.prefix)
        mixing = self._mixing()
        if metadata is None:
            shapes = zip(self.get_state_shape(), self.get_state_dtype(), strict=True)
            states = [torch.zeros(1, *shape, dtype=dtype, device=qkv.device) for shape, dtype in shapes]
            number = min(self.vllm_config.scheduler_config.max_num_seqs, max(qkv.shape[0], 1))
            rehearse(qkv, g, alpha, beta, self._pools(states), number, mixing, out)
        else:
            mix_tokens(qkv, g, alpha, beta, self._pools(self.kv_cache), metadata.requests, mixing, out)

    def _pools(self, states: Sequence[Tensor]) -> Pools:
        *sums, conv = states
        channels = self.conv1d.weight.shape[0]  # without those that align them
        return Pools(sums[0] if self.solves else None, sums[-1], conv[..., :channels])

    def _mixing(self) -> Mixing:
        config = self.config
        options = dict(
            ridge_ratio=config.ridge_ratio,
            solver=config.solver,
            solver_steps=config.solver_steps if self.solves else (),
            tolerance=config.tolerance,
        )
        conv_weight = self.conv1d.weight
        sizes = (self.heads, self.kv_heads, self.head_dim)
        maps = (self.proj_k, self.k_rep), (self.proj_v, self.v_rep)
        expand = [partial(self._expand, low_rank=one, mixing=mixing) if one else None for one, mixing in maps]
        return Mixing(*sizes, conv_weight, options, config.chunk_size, *expand)

    def _expand(self, x: Tensor, low_rank: nn.Module, mixing: Tensor | None) -> Tensor:
        """Keys or values of this process's query heads [T, H, D] from its key/value heads [T, Hk, D]."""
        return expand_heads(
            x, self.heads, low_rank, mixing, tensor_model_parallel_all_gather(x.contiguous(), dim=1)
        )

    # What vLLM asks of a layer with states

    @property
    def mamba_type(self) -> Any:
        """The attention backend of these layers."""
        return MambaAttentionBackendEnum[BACKEND]

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of a row of each pool: S_kk (if there is a solve), S_kv, inputs of the convolutions."""
        return state_shapes(self.config, get_tensor_model_parallel_world_size())

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Their dtypes."""
        return state_dtypes(self.config, self.vllm_config)


class _Convolutions(nn.Module):
    """The weights of the convolutions of q, k and v, one below the other: [C, W]. A width of 1 gets a zero tap."""

    def __init__(self, inner: int, inner_kv: int, copies: int, config: Any) -> None:
        super().__init__()
        self.parts = {"q": (0, inner), "k": (inner, inner_kv), "v": (inner + inner_kv, inner_kv)}
        self.copies, self.width = copies, config.conv_size
        channels = inner + (2 if config.use_v_conv else 1) * inner_kv
        self.weight = nn.Parameter(torch.zeros(channels, conv_width(config)), requires_grad=False)
        set_weight_attrs(self.weight, {"weight_loader": self._load})

    def _load(self, parameter: Tensor, loaded: Tensor, *_: Any) -> None:
        """The part of this process of a weight [channels of all, 1, W]."""
        first, size = self.parts[loaded.shard_id]  # type: ignore[attr-defined]
        rank = get_tensor_model_parallel_rank() // (1 if loaded.shard_id == "q" else self.copies)  # type: ignore[attr-defined]
        parameter.data[first : first + size, -self.width :] = loaded[rank * size : (rank + 1) * size, 0]


class _Gates(nn.Module):
    """The small projections of the gates, one below the other, as one product."""

    def __init__(self, hidden: int, heads: int, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names, self.heads = names, heads
        rows, biased = len(names) * heads, set(names) - {"a_proj"}
        self.weight = self._parameter(rows, hidden) if names else None
        self.bias = self._parameter(rows) if biased else None  # zero for a_proj

    def _parameter(self, *shape: int) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros(shape), requires_grad=False)
        set_weight_attrs(parameter, {"weight_loader": self._load})
        return parameter

    def _load(self, parameter: Tensor, loaded: Tensor, *_: Any) -> None:
        first = self.names.index(loaded.shard_id) * self.heads  # type: ignore[attr-defined]
        start = get_tensor_model_parallel_rank() * self.heads
        parameter.data[first : first + self.heads] = loaded[start : start + self.heads]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[T, hidden_size] -> [T, H] for each name."""
        if self.weight is None:
            return {}
        parts = F.linear(x, self.weight, self.bias).split(self.heads, dim=1)
        return dict(zip(self.names, parts, strict=True))


def gates_of(config: Any) -> tuple[str, ...]:
    """The projections of gates that a layer of a GKAConfig has."""
    solves = config.mixer == "gka"
    return tuple(
        name for name, switch in GATES.items() if getattr(config, switch) and (solves or "alpha" not in name)
    )


@eager_break_during_capture
def _operator(
    qkv: Tensor, g: Tensor | None, alpha: Tensor | None, beta: Tensor | None, out: Tensor, layer: str
) -> None:
    get_forward_context().no_compile_layers[layer].mix(qkv, g, alpha, beta, out)


def _operator_fake(
    qkv: Tensor, g: Tensor | None, alpha: Tensor | None, beta: Tensor | None, out: Tensor, layer: str
) -> None:
    """The shapes are those of `out`."""


direct_register_custom_op(OPERATOR, _operator, mutates_args=["out"], fake_impl=_operator_fake)
