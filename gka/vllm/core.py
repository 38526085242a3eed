"""A GKA layer between its projections, for the tokens of many requests, with the states of all in pools.

    q, k, v = SiLU(conv(q)), SiLU(conv(k)), SiLU(conv(v))        for each request after its own past
    o       = gated_kalmanet(q, k, v, g, alpha, beta)            likewise

Tokens of decode steps come first, one for each request; then those of prefills, packed. A decode step reads and
writes rows of the pools in place. A prefill starts from copies of rows, and its last states are written to them.
A slot below 0 is padding: nothing is written. Nothing waits for the device. It needs torch alone.

Legend: T tokens, H query heads, Hk key/value heads, D head dim, N rows of the pools, W width of the convolutions;
C channels of the convolutions: (H + 2 Hk) D, or (H + Hk) D if v has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.short_conv import Gaps, short_conv_step
from ..ops import State, gated_kalmanet, gated_kalmanet_step, gather_states, scatter_states_
from ..ops.pool import gather_rows, scatter_rows_
from ..ops.triton import conv as conv_kernels

Expand = Callable[[Tensor], Tensor]


class Pools(NamedTuple):
    """The states of all requests, a row each; written in place.

    S_kk: [N, H, D, D] float32 or bfloat16; None without a solve.
    S_kv: [N, H, D, D], the same dtype.
    conv: [N, W - 1, C], the last inputs of the convolutions, the oldest first; any float dtype.

    Each row is contiguous, and there may be gaps between rows.
    """

    S_kk: Tensor | None
    S_kv: Tensor
    conv: Tensor


class Prefill(NamedTuple):
    """A row in which each request has the W - 1 inputs before its tokens in front of them.

    length: number of places of the row, T + P (W - 1).
    tokens: [T] int64, the places of the tokens.
    before: [P (W - 1)] int64, those of the inputs before each request.
    after: [P (W - 1)] int64, those of the last inputs of each request.
    """

    length: int
    tokens: Tensor
    before: Tensor
    after: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int, width: int) -> Prefill:
        """The places for `tokens` tokens, packed by `cu_seqlens` [P + 1] of int32 or int64."""
        kept, place = width - 1, Gaps.of(cu_seqlens, tokens, width)
        number = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
        within = torch.arange(kept, device=cu_seqlens.device)
        before = (cu_seqlens[:-1].long() + kept * number).unsqueeze(1) + within
        after = (cu_seqlens[1:].long() + kept * number).unsqueeze(1) + within
        return cls(place.length, place.slots, before.flatten(), after.flatten())


class Requests(NamedTuple):
    """Which tokens belong to which request, and where its states are.

    decodes: number of requests with one token, the first tokens of the batch.
    decode_slots: [at least decodes] int32 or int64, their rows in the pools; None if there are none.
    prefill_tokens: number of tokens of the other requests.
    prefill_slots: [P] int32 or int64, the rows of the other requests; None if there are none.
    cu_seqlens: [P + 1] int32 or int64, the first of these tokens of each, and their number.
    has_state: [P] bool, whether a request has a past; its states are else taken as zero.
    prefill: the places of these tokens for the convolutions; None makes them anew in each layer.
    """

    decodes: int = 0
    decode_slots: Tensor | None = None
    prefill_tokens: int = 0
    prefill_slots: Tensor | None = None
    cu_seqlens: Tensor | None = None
    has_state: Tensor | None = None
    prefill: Prefill | None = None


class Mixing(NamedTuple):
    """What a layer does with tokens.

    heads, kv_heads, head_dim: H, Hk and D.
    conv_weight: [C, W].
    expand_k, expand_v: make keys or values [..., H, D] from [..., Hk, D]; None leaves them.
    options: keywords of `gated_kalmanet_step` for the solver.
    chunk_size: as in `gated_kalmanet`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    conv_weight: Tensor
    options: dict[str, Any]
    chunk_size: int | None = None
    expand_k: Expand | None = None
    expand_v: Expand | None = None


def mix_tokens(
    qkv: Tensor,
    g: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    pools: Pools,
    requests: Requests,
    mixing: Mixing,
    out: Tensor,
) -> None:
    """Write the outputs of all tokens to out [T, H, D], and the states after them to the pools.

    Args:
        qkv: [T, (H + 2 Hk) D], projected queries, keys and values side by side. T may be larger than the number of
            tokens; out is zero for the rest.
        g, alpha, beta: [T, H] each, as in `gated_kalmanet`; None for g means 0.
        pools, requests, mixing: see these classes.
        out: [T, H, D], the dtype of qkv.
    """
    if g is None:
        g = qkv.new_zeros(qkv.shape[0], mixing.heads, dtype=torch.promote_types(qkv.dtype, torch.float32))
    first, end = requests.decodes, requests.decodes + requests.prefill_tokens
    gates = (g, alpha, beta)
    if first:
        out[:first] = _decode(qkv[:first], [_rows(x, 0, first) for x in gates], pools, requests, mixing)
    if end > first:
        out[first:end] = _prefill(qkv[first:end], [_rows(x, first, end) for x in gates], pools, requests, mixing)
    if end < qkv.shape[0]:
        out[end:].zero_()


def rehearse(
    qkv: Tensor,
    g: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    pools: Pools,
    number: int,
    mixing: Mixing,
    out: Tensor,
) -> None:
    """Prefill the tokens as those of `number` requests, and keep no state: for servers that measure memory.

    Args:
        pools: at least one row; nothing is written.
        g: its values are not read. While vLLM measures memory, softmax attention leaves its output
            uninitialised, and what follows from that may be NaN.
        number: at least 1; some requests have no token if it is larger than T.
        qkv, alpha, beta, mixing, out: as in `mix_tokens`.
    """
    T, device = qkv.shape[0], qkv.device
    g = None if g is None else torch.zeros_like(g)
    requests = Requests(
        prefill_tokens=T,
        prefill_slots=torch.full((number,), -1, device=device),
        cu_seqlens=torch.arange(number + 1, device=device) * T // number,
        has_state=torch.zeros(number, dtype=torch.bool, device=device),
    )
    mix_tokens(qkv, g, alpha, beta, pools, requests, mixing, out)


def _rows(x: Tensor | None, first: int, end: int) -> Tensor | None:
    return None if x is None else x[first:end]


def _decode(qkv: Tensor, gates: list[Any], pools: Pools, requests: Requests, mixing: Mixing) -> Tensor:
    """o [B, H, D] of one token of each request."""
    assert requests.decode_slots is not None
    slots = requests.decode_slots[: requests.decodes]
    convolved = short_conv_step(
        qkv[:, : pools.conv.shape[2]], mixing.conv_weight, pools.conv.transpose(1, 2), slots
    )
    q, k, v = _by_head(convolved, qkv, mixing)
    g, alpha, beta = gates
    o, _ = gated_kalmanet_step(
        q,
        k,
        v,
        g,
        alpha,
        beta,
        state=State(pools.S_kk, pools.S_kv),
        state_indices=slots,
        normalize_qk=True,
        inplace=True,
        **mixing.options,
    )
    return o


def _prefill(qkv: Tensor, gates: list[Any], pools: Pools, requests: Requests, mixing: Mixing) -> Tensor:
    """o [T, H, D] of the packed tokens of all other requests, as one call of the op."""
    slots, cu_seqlens, has_state = requests.prefill_slots, requests.cu_seqlens, requests.has_state
    assert slots is not None and cu_seqlens is not None and has_state is not None
    places = requests.prefill or Prefill.of(cu_seqlens, qkv.shape[0], mixing.conv_weight.shape[1])
    convolved = _convolve_after(qkv, pools, slots, has_state, places, mixing.conv_weight)
    q, k, v = _by_head(convolved, qkv, mixing)
    g, alpha, beta = (None if x is None else x.unsqueeze(0) for x in gates)
    assert g is not None
    states = State(pools.S_kk, pools.S_kv)
    o, last = gated_kalmanet(
        q.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        g,
        alpha,
        beta,
        initial_state=gather_states(states, slots, has_state),
        output_final_state=True,
        cu_seqlens=cu_seqlens,
        chunk_size=mixing.chunk_size,
        normalize_qk=True,
        **mixing.options,
    )
    assert last is not None
    scatter_states_(states, slots, last)
    return o.squeeze(0)


def _by_head(convolved: Tensor, qkv: Tensor, mixing: Mixing) -> tuple[Tensor, Tensor, Tensor]:
    """q [..., H, D], k and v [..., Hk or H, D] from the convolved channels [..., C], or v from qkv."""
    D = mixing.head_dim
    inner, inner_kv = mixing.heads * D, mixing.kv_heads * D
    q, k, *rest = convolved.split([inner, inner_kv, convolved.shape[-1] - inner - inner_kv], dim=-1)
    v = rest[0] if rest[0].shape[-1] else qkv[..., inner + inner_kv :]
    q, k, v = (x.unflatten(-1, (-1, D)) for x in (q, k, v))
    k = k if mixing.expand_k is None else mixing.expand_k(k)
    v = v if mixing.expand_v is None else mixing.expand_v(v)
    return q, k, v


def _convolve_after(
    qkv: Tensor, pools: Pools, slots: Tensor, has_state: Tensor, places: Prefill, weight: Tensor
) -> Tensor:
    """The convolutions of packed requests [T, C], each after its last inputs; those after it go to the pool.

    In one row, each request has its W - 1 last inputs before it. At the end of its part are then its new ones.
    """
    C, W = weight.shape
    row = qkv.new_empty(places.length, C)
    row.index_copy_(0, places.tokens, qkv[:, :C])
    past = gather_rows(pools.conv, slots, has_state)
    row.index_copy_(0, places.before, past.flatten(0, 1).to(row.dtype))
    scatter_rows_(pools.conv, slots, row.index_select(0, places.after).view(*past.shape))
    if conv_kernels.usable(row.unsqueeze(0), W):
        return conv_kernels.short_convs([row.unsqueeze(0)], weight)[0].squeeze(0).index_select(0, places.tokens)
    convolved = F.silu(F.conv1d(row.t().unsqueeze(0), weight.unsqueeze(1).to(row.dtype), groups=C))
    return convolved.squeeze(0).t().index_select(0, places.tokens - (W - 1))
