"""A million decode steps: do the states drift away from the states of a new prefill?

    python -m benchmarks.bench_long_decode
    python -m benchmarks.bench_long_decode --tokens 20000

Part "op": `gated_kalmanet_step` in place. Every head has its own decay, from g = 0 (it forgets nothing) to g = -10
(it forgets almost everything at once); one head has a decay that changes from token to token. States are float32
and bfloat16. Part "layer": the layer and its cache, one token per call. At some tokens, the marks, the states are
checked:

    finite       no NaN, no infinity
    asymmetry    ||S_kk - S_kk^T|| / ||S_kk||
    least        smallest eigenvalue of S_kk / ||S_kk||; rounding can make it slightly negative
    error        ||S - S*|| / ||S*|| for S_kk and S_kv; S* comes from all tokens by the chunk-wise op in float64

At the end, o, S_kk and S_kv are compared with a prefill of the last window in float32. The window is so long that
earlier tokens have decayed to e^-16.

Legend: T tokens, H heads, one per gate, D = V dims. Tokens are made in blocks from the number of the block, so
that every window can be made again. All keys share a direction, so that S_kk is far from a multiple of I.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.common import write_result
from gka import GKAConfig, GKAForCausalLM
from gka.ops import State, gated_kalmanet, gated_kalmanet_step

BLOCK = 1000
D = 16
STEPS = (8,)  # the solve reads the states and does not change them
GATES: tuple[float | str, ...] = (0.0, -1e-5, -1e-4, -1e-3, -1e-2, -1e-1, -1.0, -10.0, "varied")
LAYER_GATES = (-1e-3, -1e-2, -1e-1, -1.0)
FADED = 16.0
OPTIONS: dict[str, Any] = dict(solver_steps=STEPS, normalize_qk=True)


class Tokens(NamedTuple):
    """q, k, v: [1, T, H, D]; g, alpha, beta: [1, T, H]; float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    alpha: Tensor
    beta: Tensor


def block_of_tokens(number: int) -> Tokens:
    """The tokens number * BLOCK to (number + 1) * BLOCK - 1."""
    generator = torch.Generator().manual_seed(number)
    H = len(GATES)
    q, k, v = (torch.randn(1, BLOCK, H, D, generator=generator) for _ in range(3))
    alpha, beta, chance = (torch.rand(1, BLOCK, H, generator=generator) for _ in range(3))
    k[..., 0] += 2.0
    g = torch.tensor([0.0 if gate == "varied" else float(gate) for gate in GATES]).expand(1, BLOCK, H).clone()
    varied = GATES.index("varied")
    g[..., varied] = torch.where(chance[..., varied] < 1e-3, -5.0, -2e-3 * chance[..., varied])
    return Tokens(q, k, v, g, alpha, beta)


def no_state(dtype: torch.dtype) -> State:
    return State(*(torch.zeros(1, len(GATES), D, D, dtype=dtype) for _ in range(2)))


def marks_of(tokens: int) -> list[int]:
    """Numbers of tokens after which the states are checked: powers of ten, tenths, and the last."""
    powers = [10**n for n in range(3, 10) if 10**n < tokens]
    tenths = [tokens * n // 10 // BLOCK * BLOCK for n in range(1, 10)]
    return sorted({*powers, *(t for t in tenths if t), tokens})


def reference_states(tokens: int) -> dict[int, State]:
    """States in float64 at the marks, computed from all tokens."""
    found, state, marks = {}, no_state(torch.float64), set(marks_of(tokens))
    for number in range(tokens // BLOCK):
        wide = Tokens(*(x.double() for x in block_of_tokens(number)))
        final = gated_kalmanet(*wide, initial_state=state, output_final_state=True, **OPTIONS)[1]
        assert final is not None
        state = final
        if (number + 1) * BLOCK in marks:
            found[(number + 1) * BLOCK] = state
    return found


def relative(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref|| in float64."""
    return float((out.double() - ref.double()).norm() / ref.double().norm())


def health(S_kk: Tensor) -> dict[str, Any]:
    """Checks of S_kk [D, D] of one head."""
    wide = S_kk.double()
    if not bool(wide.isfinite().all()):
        return {"finite": False}
    size = float(wide.norm())
    least = float(torch.linalg.eigvalsh((wide + wide.T) / 2)[0])
    return {"finite": True, "asymmetry": float((wide - wide.T).norm()) / size, "least": least / size}


def decode(tokens: int, dtype: torch.dtype, at_mark: Callable[[int, State], None]) -> tuple[Tensor, State]:
    """Decode all tokens with states of a dtype; returns the last o [1, H, D] and the states."""
    state, marks = no_state(dtype), set(marks_of(tokens))
    o = torch.empty(0)
    for number in range(tokens // BLOCK):
        q, k, v, g, alpha, beta = (x.unbind(1) for x in block_of_tokens(number))
        for t in range(BLOCK):
            o, _ = gated_kalmanet_step(
                q[t], k[t], v[t], g[t], alpha[t], beta[t], state=state, inplace=True, **OPTIONS
            )
        if (number + 1) * BLOCK in marks:
            at_mark((number + 1) * BLOCK, state)
    return o, state


def window_of(gate: float | str, tokens: int) -> int:
    """The number of tokens after which a head has forgotten, in whole blocks; all tokens if it never forgets."""
    rate = 6e-3 if gate == "varied" else -float(gate)  # varied: -1e-3 per token, and -5 at one token in a thousand
    needed = math.ceil(FADED / rate / BLOCK) * BLOCK if rate else tokens
    return min(tokens, needed)


def prefill(head: int, window: int, tokens: int) -> tuple[Tensor, State]:
    """o of the last token and the states of one head, from the last window in float32, in one call."""
    blocks = [block_of_tokens(number) for number in range((tokens - window) // BLOCK, tokens // BLOCK)]
    inputs = [torch.cat([x[:, :, head : head + 1] for x in parts], dim=1) for parts in zip(*blocks, strict=True)]
    o, state = gated_kalmanet(*inputs, output_final_state=True, **OPTIONS)
    assert state is not None
    return o[:, -1], state


@torch.inference_mode()
def op_rows(tokens: int, dtype: torch.dtype, references: dict[int, State]) -> Iterator[dict[str, Any]]:
    """One row per gate: the checks at every mark, and the comparison with a new prefill at the end."""
    seen: list[list[dict[str, Any]]] = [[] for _ in GATES]

    def look(token: int, state: State) -> None:
        for head in range(len(GATES)):
            parts = zip(("S_kk", "S_kv"), state, references[token], strict=True)
            errors = {name: relative(S[0, head], ref[0, head]) for name, S, ref in parts}
            seen[head].append({"token": token, **health(state.S_kk[0, head]), "error": errors})

    begin = time.perf_counter()
    o, state = decode(tokens, dtype, look)
    seconds = time.perf_counter() - begin
    for head, gate in enumerate(GATES):
        window = window_of(gate, tokens)
        fresh_o, fresh = prefill(head, window, tokens)
        yield {
            "part": "op",
            "gate": gate,
            "states": str(dtype).removeprefix("torch."),
            "tokens": tokens,
            "D": D,
            "steps": list(STEPS),
            "microseconds per token, all gates": round(seconds / tokens * 1e6),
            "marks": seen[head],
            "window": window,
            "beside a prefill of the window": {
                "o": relative(o[:, head], fresh_o[:, 0]),
                "S_kk": relative(state.S_kk[:, head], fresh.S_kk[:, 0]),
                "S_kv": relative(state.S_kv[:, head], fresh.S_kv[:, 0]),
            },
        }


def layer_of_gates() -> tuple[Any, GKAConfig]:
    """A layer whose heads have the decays LAYER_GATES for every token, and its configuration."""
    torch.manual_seed(0)
    H = len(LAYER_GATES)
    config = GKAConfig(
        vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=H,
        num_key_value_heads=H // 2, head_dim=8, solver_steps=list(STEPS), initializer_range=0.3,
    )  # fmt: skip
    layer = GKAForCausalLM(config).model.layers[0].gka.eval()
    layer.a_proj.weight.zero_()
    layer.dt_bias.fill_(math.log(math.e - 1))  # its softplus is 1
    layer.A_log.copy_(torch.tensor(LAYER_GATES).neg().log())
    return layer, config


def hidden_states(number: int) -> Tensor:
    """The hidden states of a block, [1, BLOCK, 32]."""
    return torch.randn(1, BLOCK, 32, generator=torch.Generator().manual_seed(number))


@torch.inference_mode()
def layer_rows(tokens: int) -> Iterator[dict[str, Any]]:
    """One row per head, and one row for the outputs."""
    layer, config = layer_of_gates()
    cache = DynamicCache(config=config)
    layer(hidden_states(0)[:, :1], past_key_values=cache)  # the first token creates the states of the cache
    begin, out = time.perf_counter(), torch.empty(0)
    for number in range(tokens // BLOCK):
        x = hidden_states(number)
        for t in range(1 if number == 0 else 0, BLOCK):
            out = layer(x[:, t : t + 1], past_key_values=cache)
    seconds = time.perf_counter() - begin

    window = max(window_of(gate, tokens) for gate in LAYER_GATES)
    fresh = DynamicCache(config=config)
    last = [hidden_states(number) for number in range((tokens - window) // BLOCK, tokens // BLOCK)]
    expected = layer(torch.cat(last, dim=1), past_key_values=fresh)[:, -1:]
    states, fresh_states = (c.layers[0].recurrent_states for c in (cache, fresh))
    common = {"part": "layer", "states": "float32", "tokens": tokens, "window": window}
    for head, gate in enumerate(LAYER_GATES):
        yield {
            **common,
            "gate": gate,
            **health(states[0][0, head]),
            "beside a prefill of the window": {
                name: relative(states[n][0, head], fresh_states[n][0, head])
                for n, name in enumerate(("S_kk", "S_kv"))
            },
        }
    conv = [relative(cache.layers[0].conv_states[n], fresh.layers[0].conv_states[n]) for n in range(3)]
    yield {
        **common,
        "gate": "output",
        "microseconds per token": round(seconds / tokens * 1e6),
        "beside a prefill of the window": {"out": relative(out, expected), "convolution states": max(conv)},
    }


def rows(tokens: int) -> Iterator[dict[str, Any]]:
    """All rows."""
    references = reference_states(tokens)
    yield from op_rows(tokens, torch.float32, references)
    yield from op_rows(tokens, torch.bfloat16, references)
    yield from layer_rows(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_long_decode",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=1_000_000, help=f"number of tokens, a multiple of {BLOCK}")
    parser.add_argument("--output", type=Path, help="JSON file; default: a new file in benchmarks/results/")
    options = parser.parse_args()
    if options.tokens < BLOCK or options.tokens % BLOCK:
        parser.error(f"--tokens must be a multiple of {BLOCK}")
    torch.set_num_threads(1)
    command = " ".join(["python -m benchmarks.bench_long_decode", *sys.argv[1:]])
    write_result("long_decode", rows(options.tokens), command, options.output)


if __name__ == "__main__":
    main()
