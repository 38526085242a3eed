"""The Gated KalmaNet layer (arXiv 2511.21016, figure 2): projections, short convolutions, gates, op, readout.

    q, k, v = SiLU(conv(x W_q)), SiLU(conv(x W_k)), SiLU(conv(x W_v))      q, k / (||.||_2 + 1e-6) per head
    g     = -exp(A_log) softplus(x W_a + dt_bias)                          log-decay of the state
    beta  = sigmoid(x W_b + b_b) + 1e-6                                    write strength, multiplies k and v
    alpha = sigmoid(x W_alpha + b_alpha)                                   weight of the solve
    y     = RMSNorm(gated_kalmanet(q, k, v, g, alpha, beta)) SiLU(x W_g)   per head
    out   = y W_o

With mixer "gla" nothing is solved (alpha = 0): gated linear attention, the same layer otherwise.

With `kv_proj_rank` every query head has keys and values of its own, expanded behind the convolution (e: k or v; R
repeats the heads, or is learned, `k_rep` and `v_rep`):

    e <- R e + SiLU(e A^T) B^T      over heads; over channels, of all heads together

Legend: B batch, T time, H query heads, Hk key/value heads, D head dim of q, k and v, W width of the convolutions,
N packed sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from ..ops import State, gated_kalmanet, gated_kalmanet_step
from ..ops.checks import check_cu_seqlens
from . import gated_norm
from .padding import RealFirst
from .short_conv import ShortConv, last_inputs, packing

BETA_FLOOR = 1e-6
UNDECAYED = ("A_log", "dt_bias")


def decayed(names: list[str]) -> list[str]:
    """The names of parameters without those that weight decay leaves alone; by name, for FSDP2 drops marks.

    D is Mamba-2's, whose authors leave it alone, too.
    """
    return [name for name in names if name.rsplit(".", 1)[-1] not in (*UNDECAYED, "D")]


def at_least_float32(x: Tensor) -> Tensor:
    """x itself if it has 32 or 64 bits, else x in float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def fresh_A_log(heads: int, device: torch.device | None = None) -> Tensor:
    """[heads] in float32: log U(0, 16), kept away from log 0."""
    return torch.empty(heads, device=device, dtype=torch.float32).uniform_(0.01, 16.0).log()


def fresh_dt_bias(heads: int, device: torch.device | None = None) -> Tensor:
    """[heads] in float32: softplus^{-1}(dt), dt log-uniform in [1e-3, 1e-1], at least 1e-4."""
    low, high, floor = math.log(1e-3), math.log(1e-1), 1e-4
    dt = torch.empty(heads, device=device, dtype=torch.float32).uniform_(low, high).exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


class GatedRMSNorm(nn.Module):
    """y = o / sqrt(mean(o^2) + eps) * weight * SiLU(gate), over the last dim, in at least 32 bits.

    Args:
        dim: size of the last dim.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, o: Tensor, gate: Tensor | None = None) -> Tensor:
        """o, gate: [B, T, ..., dim] -> [B, T, ..., dim] in o's dtype; without a gate that factor is 1."""
        if gate is not None and gated_norm.usable(o):
            return gated_norm.gated_rms_norm(o, gate, self.weight, self.eps)
        wide = at_least_float32(o)
        y = F.rms_norm(wide, o.shape[-1:], self.weight.to(wide.dtype), self.eps)
        if gate is not None:
            y = y * F.silu(at_least_float32(gate))
        return y.to(o.dtype)


def repeated_heads(heads: int, kv_heads: int, device: torch.device | None = None) -> Tensor:
    """[heads, kv_heads] in float32, ones and zeros: query head h reads key/value head h // (heads / kv_heads)."""
    return torch.eye(kv_heads, device=device).repeat_interleave(heads // kv_heads, dim=0)


class ZeroLinear(nn.Linear):
    """A linear map whose weights a model starts at zero."""


class LowRank(nn.Module):
    """y = SiLU(x A^T) B^T.

    Args:
        inputs, rank, outputs: sizes of x, of what lies between, and of y.
    """

    def __init__(self, inputs: int, rank: int, outputs: int) -> None:
        super().__init__()
        self.linearA = nn.Linear(inputs, rank, bias=False)
        self.linearB = ZeroLinear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        y: Tensor = self.linearB(F.silu(self.linearA(x)))
        return y


def _is_plain(linear: nn.Linear) -> bool:
    """Whether only its weight and bias make its output: no adapter, quantised weight, hook or offloading."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    if type(linear) is not nn.Linear or any(hooks) or "forward" in linear.__dict__:
        return False
    return all(type(x) in (nn.Parameter, Tensor) for x in (linear.weight, linear.bias) if x is not None)


def _project(x: Tensor, *projections: nn.Linear | None) -> list[Tensor | None]:
    """What each of the small projections makes of x [B, T, hidden]; None for None.

    Together they read x once, and add to its gradient once: at hidden 2048 each costs more in bytes than its few
    columns in arithmetic.
    """
    given = [linear for linear in projections if linear is not None]
    if len(given) < 2 or x.shape[1] == 1 or not all(map(_is_plain, given)):
        return [None if linear is None else linear(x) for linear in projections]
    weights: list[Tensor] = [p.weight for p in given]
    biases: list[Tensor] = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in given]
    out = F.linear(x, torch.cat(weights), torch.cat(biases))
    parts = iter(out.split([p.out_features for p in given], dim=2))
    return [None if linear is None else next(parts) for linear in projections]


class _Past(NamedTuple):
    """What the cache holds for a layer.

    conv: the last inputs of the convolutions of q, k and v, [B, H D or Hk D, W - 1].
    """

    conv: list[Tensor]
    state: State


class GatedKalmaNet(nn.Module):
    """The Gated KalmaNet layer.

    Args:
        config: sizes, solver and switches, a GKAConfig.
        layer_idx: the layer's place in `past_key_values`.

    The parameters are named as in the published checkpoints. `A_log` and `dt_bias` carry the attribute
    `_no_weight_decay = True`.
    """

    def __init__(self, config: Any, layer_idx: int = 0) -> None:
        super().__init__()
        config.check()
        self.hidden_size, self.layer_idx = config.hidden_size, layer_idx
        self.head_dim, self.conv_size = config.head_dim, config.conv_size
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.solves = config.mixer == "gka"
        self.ridge_ratio, self.chunk_size = config.ridge_ratio, config.chunk_size
        self.set_solver_steps(config.solver_steps)
        hidden, H = config.hidden_size, self.num_heads
        inner, inner_kv = H * self.head_dim, self.num_key_value_heads * self.head_dim

        self.q_proj = nn.Linear(hidden, inner, bias=False)
        self.k_proj = nn.Linear(hidden, inner_kv, bias=False)
        self.v_proj = nn.Linear(hidden, inner_kv, bias=False)
        self.q_conv1d = ShortConv(inner, self.conv_size)
        self.k_conv1d = ShortConv(inner_kv, self.conv_size)
        self.v_conv1d = ShortConv(inner_kv, self.conv_size) if config.use_v_conv else None
        self.a_proj = nn.Linear(hidden, H, bias=False) if config.use_forget_gate else None
        if config.use_forget_gate:
            self.A_log = nn.Parameter(fresh_A_log(H))
            self.dt_bias = nn.Parameter(fresh_dt_bias(H))
        self.b_proj = nn.Linear(hidden, H) if config.use_beta_gate else None
        self.alpha_proj = nn.Linear(hidden, H) if config.use_alpha_connection and self.solves else None
        self.g_proj = nn.Linear(hidden, inner, bias=False) if config.use_output_gate else None
        rank, mixed = config.kv_proj_rank, config.kv_learnable_residual
        self.proj_k = None if rank is None else LowRank(inner_kv, rank, inner)
        self.proj_v = None if rank is None else LowRank(inner_kv, rank, inner)
        self.k_rep = nn.Parameter(repeated_heads(H, self.num_key_value_heads)) if mixed else None
        self.v_rep = nn.Parameter(repeated_heads(H, self.num_key_value_heads)) if mixed else None
        self.o_norm = GatedRMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(inner, hidden, bias=False)

    def set_solver_steps(self, solver_steps: Sequence[int] | None) -> None:
        """Solve with other steps from the next call on, as in `GKAConfig`; with mixer "gla" there are none.

        Raises:
            ValueError: no steps, or one that is no integer of at least 1.
        """
        if solver_steps is not None and not (solver_steps and all(type(n) is int and n > 0 for n in solver_steps)):
            raise ValueError(
                f"solver_steps is {solver_steps!r}; expected None or integers of at least 1, such as [31] "
                "or [16, 16]"
            )
        self.solver_steps = (None if solver_steps is None else tuple(solver_steps)) if self.solves else ()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens of every row, each with its past.

        Args:
            hidden_states: [B, T, hidden_size], any float dtype.
            attention_mask: [B, T], 0 for a pad, which may stand anywhere; any dtype. A pad changes nothing for
                the other tokens and for the cache, and gives 0.
            past_key_values: a cache of transformers, `DynamicCache(config=config)`: the rows go on from what it
                holds for this layer, and it is brought up to date, in place. Gradients flow through it.
            cu_seqlens: [N + 1] int32 or int64, for packed sequences: sequence n is tokens cu_seqlens[n] to
                cu_seqlens[n + 1] of the only row.

        Returns:
            [B, T, hidden_size] in the dtype of the weights, or that of autocast.

        Raises:
            TypeError, ValueError: an argument does not fit, or packed sequences with a mask or a cache.
        """
        self._check(hidden_states, attention_mask, past_key_values, cu_seqlens)
        if hidden_states.shape[1] == 0:
            return hidden_states
        rows = None if attention_mask is None else RealFirst(attention_mask)
        if rows is not None:
            hidden_states = rows.compress(hidden_states)
        past = self._read(past_key_values, hidden_states.shape[0])
        q, k, v, inputs = self._qkv(hidden_states, past, cu_seqlens)
        g, alpha, beta = self._gates(hidden_states, rows)
        o, state = self._op(q, k, v, g, alpha, beta, past, cu_seqlens, past_key_values is not None)
        if past_key_values is not None and state is not None:
            lengths = None if rows is None else rows.lengths
            self._write(past_key_values, [last_inputs(*x, self.conv_size, lengths) for x in inputs], state)
        gate = None if self.g_proj is None else self.g_proj(hidden_states).view_as(o)
        out = self.o_proj(self.o_norm(o, gate).flatten(2))
        return out if rows is None else rows.restore(out)

    def _qkv(
        self, x: Tensor, past: _Past | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor | None]]]:
        """q [B, T, H, D], k and v [B, T, Hk or H, D], and the inputs of the convolutions for `last_inputs`."""
        packed = None
        outputs, inputs = [], []
        streams = ((self.q_proj, self.q_conv1d), (self.k_proj, self.k_conv1d), (self.v_proj, self.v_conv1d))
        for number, (projection, conv) in enumerate(streams):
            y = projection(x)
            if conv is not None and cu_seqlens is not None:
                packed = packing(y, cu_seqlens, self.conv_size) if packed is None else packed
                y = conv(y, packed=packed)
            elif conv is not None:
                state = None if past is None else past.conv[number]
                inputs.append((y, state))
                y = conv(y, state)
            outputs.append(y.unflatten(2, (-1, self.head_dim)))
        q, k, v = outputs
        if self.proj_k is not None and self.proj_v is not None:
            k, v = self._expand(k, self.proj_k, self.k_rep), self._expand(v, self.proj_v, self.v_rep)
        return q, k, v, inputs

    def _expand(self, x: Tensor, low_rank: LowRank, mixing: Tensor | None) -> Tensor:
        """Keys or values of every query head: [B, T, Hk, D] -> [B, T, H, D]."""
        if mixing is None:
            residual = x.repeat_interleave(self.num_heads // self.num_key_value_heads, dim=2)
        else:
            residual = torch.einsum("hk,btkd->bthd", mixing.to(x.dtype), x)
        return residual + low_rank(x.flatten(2)).unflatten(2, (-1, self.head_dim))

    def _gates(self, x: Tensor, rows: RealFirst | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """g, alpha and beta, [B, T, H] each, in at least 32 bits; at pads g = 0 and beta = 0."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        alpha = beta = None
        raw_g, raw_beta, raw_alpha = _project(x, self.a_proj, self.b_proj, self.alpha_proj)
        if raw_g is None:
            g = x.new_zeros(*x.shape[:2], self.num_heads, dtype=wide)
        else:
            g = -torch.exp(self.A_log.to(wide)) * F.softplus(raw_g.to(wide) + self.dt_bias.to(wide))
        if raw_beta is not None:
            beta = torch.sigmoid(raw_beta.to(wide)) + BETA_FLOOR
        if raw_alpha is not None:
            alpha = torch.sigmoid(raw_alpha.to(wide))
        if rows is not None:
            real = rows.real.unsqueeze(2).to(wide)
            g = g * real
            beta = real.expand_as(g) if beta is None else beta * real
        return g, alpha, beta

    def _op(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        alpha: Tensor | None,
        beta: Tensor | None,
        past: _Past | None,
        cu_seqlens: Tensor | None,
        state_wanted: bool,
    ) -> tuple[Tensor, State | None]:
        """o [B, T, H, D] in q's dtype and, if wanted, the state behind the last token."""
        options: dict[str, Any] = dict(
            ridge_ratio=self.ridge_ratio, solver_steps=self.solver_steps, normalize_qk=True
        )
        with torch.autocast(q.device.type, enabled=False):  # dtypes are explicit from here on
            if past is not None and q.shape[1] == 1:
                token: list[Any] = [None if x is None else x[:, 0] for x in (q, k, v, g, alpha, beta)]
                inplace = not torch.is_grad_enabled()  # else `_read` copied the states
                o, state = gated_kalmanet_step(*token, state=past.state, inplace=inplace, **options)
                return o.unsqueeze(1), state
            return gated_kalmanet(
                q,
                k,
                v,
                g,
                alpha,
                beta,
                initial_state=None if past is None else past.state,
                output_final_state=state_wanted,
                cu_seqlens=cu_seqlens,
                chunk_size=self.chunk_size,
                **options,
            )

    def _read(self, cache: Cache | None, batch: int) -> _Past | None:
        """What the cache holds for this layer; None if it holds nothing yet."""
        if cache is None or not cache.has_previous_state(self.layer_idx):
            return None
        held: Any = cache.layers[self.layer_idx]
        S_kk, S_kv = held.recurrent_states[0] if self.solves else None, held.recurrent_states[1]
        if S_kv.shape[0] != batch:
            raise ValueError(
                f"hidden_states has {batch} rows and past_key_values {S_kv.shape[0]}; expected the same number"
            )
        if torch.is_grad_enabled():  # the cache is written in place, autograd may still need what it held
            S_kk, S_kv = None if S_kk is None else S_kk.clone(), S_kv.clone()
        return _Past([held.conv_states[number] for number in range(3)], State(S_kk, S_kv))

    def _write(self, cache: Cache, conv: list[Tensor], state: State) -> None:
        """Bring the cache up to date: convolution states of W - 1 columns (none of v without its convolution)."""
        if self.v_conv1d is None:
            conv = [*conv, conv[1][..., :0]]
        for number, inputs in enumerate(conv):
            cache.update_conv_state(inputs, self.layer_idx, state_idx=number)
        held: Any = cache.layers[self.layer_idx]
        for number, sums in enumerate(state):
            if (
                sums is not None and sums is not held.recurrent_states[number]
            ):  # a decode step wrote what the cache holds
                cache.update_recurrent_state(sums, self.layer_idx, state_idx=number)

    def _check(self, x: Tensor, mask: Tensor | None, cache: Cache | None, cu_seqlens: Tensor | None) -> None:
        if x.ndim != 3 or x.shape[2] != self.hidden_size:
            raise ValueError(f"hidden_states has shape {tuple(x.shape)}; expected [B, T, {self.hidden_size}]")
        if mask is not None and tuple(mask.shape) != tuple(x.shape[:2]):
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; expected {tuple(x.shape[:2])}")
        if cu_seqlens is not None and mask is not None:
            raise ValueError("cu_seqlens and attention_mask are both given; leave the pads out of a packed batch")
        if cu_seqlens is not None and cache is not None:
            raise ValueError(
                "cu_seqlens and past_key_values are both given; a cache has one state per row: "
                "pass the sequences as rows, padded, with an attention_mask"
            )
        if cu_seqlens is not None and x.shape[0] != 1:
            raise ValueError(f"hidden_states has {x.shape[0]} rows; expected 1 with cu_seqlens: concatenate them")
        if cu_seqlens is not None:  # the op does so, too, but the convolutions come first
            check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])
        if cache is None:
            return
        if not isinstance(cache, Cache):
            raise TypeError(f"past_key_values is a {type(cache).__name__}; expected a transformers.Cache")
        held = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
        if not isinstance(held, LinearAttentionCacheLayerMixin):
            raise ValueError(
                f"past_key_values has no linear_attention layer at {self.layer_idx}; "
                "expected one made with the model's configuration, DynamicCache(config=model.config)"
            )
        if held.record_past:
            raise ValueError(
                "past_key_values records its past, to be rolled back; a GKA layer's state cannot be rolled back: "
                "a model with such layers cannot be the assistant of assisted generation"
            )

    # Parameters are replaced when a model is loaded or copied: the marks are set whenever that happens.

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in nn.Module; marks A_log and dt_bias."""
        super().register_parameter(name, param)
        if name in UNDECAYED and param is not None:
            param._no_weight_decay = True  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in UNDECAYED:
            if self._parameters.get(name) is not None:
                self.register_parameter(name, self._parameters[name])
