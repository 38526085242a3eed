"""What tokens weigh: scales of normalised rows, and weights of keys in the states at their chunk's end.

    r = 1 / (||k||_2 + 1e-6)            to_kk_j = e^{G_C - G_j} beta_j^2 r_j^2          decay = e^{G_C}
                                        to_kv_j = e^{G_C - G_j} beta_j^2 r_j

Legend: C tokens of a chunk, j one of them; NT chunks; H query heads, Hk key/value heads; D key dim.
"""

import triton
import triton.language as tl

from ..call import Call, KeyWeights, Scales
from ..launch import launch
from .common import chunk_of, key_weights, last_of, log_decays, store_scalars


@triton.jit(do_not_specialize=["rows"])
def scales_of_rows(x_ptr, scale_ptr, rows, D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    """1 / (||row||_2 + 1e-6) of x [rows, D] -> scale [rows] float32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BD)
    x = tl.load(x_ptr + row[:, None] * D + d[None, :], mask=(row < rows)[:, None] & (d < D)[None, :], other=0.0)
    x = x.to(tl.float32)
    tl.store(scale_ptr + row, 1.0 / (tl.sqrt(tl.sum(x * x, 1)) + 1e-6), mask=row < rows)


@triton.jit
def weigh_tokens(
    g_ptr, beta_ptr, key_scale_ptr,  # [tokens, H] twice, [tokens, Hk] float32
    to_kk_ptr, to_kv_ptr, decay_ptr,  # out: [tokens, H] twice, [NT, H], float32
    chunk_ptr, H, Hk,
    C: tl.constexpr, HAS_BETA: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    h, chunk = program % H, program // H
    start, end = chunk_of(chunk_ptr, chunk)
    if start >= end:
        return
    G = log_decays(g_ptr, start, end, H, h, C)
    beta, scale = key_weights(
        beta_ptr, key_scale_ptr, start, end, H, h, Hk, h // (H // Hk), C, HAS_BETA, NORMALIZE
    )
    to_kv = tl.exp(last_of(G, C) - G) * beta * beta * scale
    store_scalars(to_kk_ptr, to_kv * scale, start, end, H, h, C)
    store_scalars(to_kv_ptr, to_kv, start, end, H, h, C)
    tl.store(decay_ptr + chunk * H + h, tl.exp(last_of(G, C)))


def launch_scales_of_rows(call: Call) -> Scales:
    """Of q and k, if they are normalised."""
    if not call.normalize:
        return Scales(None, None)
    found = []
    for rows in (call.q, call.k):
        scale, count = call.empty(*rows.shape[:3]), rows.shape[:3].numel()
        launch(scales_of_rows, -(-count // 16),
            x_ptr=rows, scale_ptr=scale, rows=count, D=call.D, ROWS=16, BD=call.BD,
        )  # fmt: skip
        found.append(scale)
    return Scales(*found)


def launch_weigh_tokens(call: Call, *, scales: Scales) -> KeyWeights:
    weights = KeyWeights(call.empty_scalars(), call.empty_scalars(), call.empty(call.NT, call.H))
    launch(weigh_tokens, call.NT * call.H,
        g_ptr=call.g, beta_ptr=call.beta, key_scale_ptr=scales.key,
        to_kk_ptr=weights.to_kk, to_kv_ptr=weights.to_kv, decay_ptr=weights.decay,
        chunk_ptr=call.chunks, H=call.H, Hk=call.Hk,
        C=call.C, HAS_BETA=call.has_beta, NORMALIZE=call.normalize, num_warps=1,
    )  # fmt: skip
    return weights
