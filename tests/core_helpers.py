"""A layer of gka.nn that decodes and prefills by gka.vllm.core, from pools; tests of both devices share it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from model_helpers import tiny_layer
from torch import Tensor

from gka import GatedKalmaNet
from gka.nn.projections import expand_heads
from gka.vllm.core import Mixing, Pools, Prefill, Requests, mix_tokens

ROWS = 9  # of the pools
LAYERS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "without groups": dict(num_key_value_heads=4),
    "without v convolution": dict(use_v_conv=False),
    "heads expanded": dict(kv_proj_rank=3, kv_learnable_residual=True),
    "heads expanded, repeated": dict(kv_proj_rank=3),
    "gla": dict(mixer="gla"),
    "no gates": dict(use_alpha_connection=False, use_beta_gate=False, use_output_gate=False),
    "no decay": dict(use_forget_gate=False),
    "conjugate gradient": dict(solver="cg", solver_steps=[9, 9]),
}


def core_layer(kind: str, dtype: torch.dtype, device: Any = "cpu") -> GatedKalmaNet:
    """A layer of LAYERS with random weights."""
    return tiny_layer(dtype, **LAYERS[kind]).to(device).requires_grad_(False)


def mixing_of(layer: GatedKalmaNet) -> Mixing:
    """What the layer does between its projections."""
    convolutions = [conv.weight.squeeze(1) for conv in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d) if conv]
    expand = [None, None]
    if layer.proj_k is not None:
        maps = ((layer.proj_k, layer.k_rep), (layer.proj_v, layer.v_rep))
        expand = [partial(expand_heads, heads=layer.num_heads, low_rank=one, mixing=rep) for one, rep in maps]
    options = layer._op_options()
    options.pop("normalize_qk")
    sizes = (layer.num_heads, layer.num_kv_heads, layer.head_dim)
    return Mixing(*sizes, torch.cat(convolutions), options, None, *expand)


def new_pools(layer: GatedKalmaNet, dtype: torch.dtype) -> Pools:
    """Pools full of NaN, a page of one storage for each row, as a server has them."""
    H, D, weight = layer.num_heads, layer.head_dim, mixing_of(layer).conv_weight
    shapes = [(H, D, D)] * (2 if layer.solves else 1) + [(layer.conv_size - 1, len(weight))]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    storage = torch.full((ROWS, sum(sizes) + 8), torch.nan, dtype=dtype, device=weight.device)
    parts = storage[:, : sum(sizes)].split(sizes, dim=1)
    *sums, conv = (part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True))
    return Pools(sums[0] if layer.solves else None, sums[-1], conv)


def projected(layer: GatedKalmaNet, x: Tensor) -> tuple[Tensor, Any, Any, Any]:
    """qkv, g, alpha and beta of `mix_tokens` for the tokens x [T, hidden_size]."""
    qkv = torch.cat([projection(x) for projection in (layer.q_proj, layer.k_proj, layer.v_proj)], dim=1)
    g, alpha, beta = (None if gate is None else gate[0] for gate in layer._gates(x.unsqueeze(0), None))
    return qkv, None if layer.a_proj is None else g, alpha, beta


def step(layer: GatedKalmaNet, x: Tensor, pools: Pools, requests: Requests) -> Tensor:
    """The layer for the tokens x [T, hidden_size] of one step, [T, hidden_size]."""
    inputs = projected(layer, x)
    out = inputs[0].new_full((len(x), layer.num_heads, layer.head_dim), torch.nan)
    mix_tokens(*inputs, pools, requests, mixing_of(layer), out)
    gate = None if layer.g_proj is None else layer.g_proj(x).view_as(out)
    y: Tensor = layer.o_proj(layer.o_norm(out, gate).flatten(1))
    return y


def requests_of(
    decodes: list[int],
    prefills: list[tuple[int, int, bool]],
    device: Any = "cpu",
    dtype: Any = torch.int32,
    width: int | None = None,
) -> Requests:
    """From the slots of decode steps, and slot, tokens and whether there is a past of each prefill.

    width: of the convolutions, to make the places of the prefills here and not in the layer.
    """
    lengths = torch.tensor([0, *(tokens for _, tokens, _ in prefills)]).cumsum(0)
    places = Prefill.of(lengths.to(device), int(lengths[-1]), width) if width is not None else None
    return Requests(
        decodes=len(decodes),
        decode_slots=torch.tensor(decodes, dtype=dtype, device=device) if decodes else None,
        prefill_tokens=int(lengths[-1]),
        prefill_slots=torch.tensor([slot for slot, _, _ in prefills], dtype=dtype, device=device),
        cu_seqlens=lengths.to(device, dtype),
        has_state=torch.tensor([past for _, _, past in prefills], device=device, dtype=torch.bool),
        prefill=places,
    )


# Slot, tokens of the request in each of three steps. The first starts with its one token, the last later.
REQUESTS = ((4, (1, 1, 1)), (2, (7, 1, 1)), (7, (130, 5, 1)), (5, (2, 70, 3)), (8, (0, 2, 1)))


def served(layer: GatedKalmaNet, xs: list[Tensor], pools: Pools, padding: bool = True) -> list[Tensor]:
    """Outputs of the tokens xs of all REQUESTS, in three steps that decode some and prefill others.

    With padding there are rows without a request in between: decode steps and a prefill.
    """
    done, outputs, device = [0] * len(xs), [[] for _ in xs], xs[0].device
    for number in range(3):
        counts = [tokens[number] for _, tokens in REQUESTS]
        first = [n for n, count in enumerate(counts) if count == 1 and done[n]]
        rest = [n for n, count in enumerate(counts) if count and n not in first]
        order: list[int | None] = [*first, *([None, None] if padding else []), *rest]
        slots = [REQUESTS[n][0] for n in first] + ([-1, -1] if padding else [])
        prefills = [(REQUESTS[n][0], counts[n], done[n] > 0) for n in rest]
        tokens = [torch.ones_like(xs[0][:1]) if n is None else xs[n][done[n] : done[n] + counts[n]] for n in order]
        if padding:
            prefills.insert(1, (-1, 3, False))
            tokens.insert(len(slots) + 1, torch.ones_like(xs[0][:3]))
            order.insert(len(slots) + 1, None)
        width = layer.conv_size if number == 1 else None
        requests = requests_of(slots, prefills, device, width=width)
        lengths = [len(part) for part in tokens]
        y = step(layer, torch.cat([*tokens, torch.ones_like(xs[0][:2])]), pools, requests)  # two rows too many
        for n, part in zip(order, y.split([*lengths, 2]), strict=False):
            if n is not None:
                outputs[n].append(part)
                done[n] += len(part)
    return [torch.cat(parts) for parts in outputs]


def tokens_of_requests(layer: GatedKalmaNet, dtype: torch.dtype, device: Any = "cpu") -> list[Tensor]:
    """Random tokens [T, hidden_size] of each of REQUESTS."""
    generator = torch.Generator().manual_seed(3)
    lengths = [sum(tokens) for _, tokens in REQUESTS]
    return [
        torch.randn(n, layer.hidden_size, generator=generator, dtype=torch.float64).to(device, dtype)
        for n in lengths
    ]
