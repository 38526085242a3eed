"""The Gated KalmaNet layer (arXiv 2511.21016, figure 2): projections, short convolutions, gates, op, readout.

    q, k, v = SiLU(conv(x W_q)), SiLU(conv(x W_k)), SiLU(conv(x W_v))      q, k / (||.||_2 + 1e-6) per head
    g     = -exp(A_log) softplus(x W_a + dt_bias)                          log-decay of the state
    beta  = sigmoid(x W_b + b_b) + 1e-6                                    write strength, multiplies k and v
    alpha = sigmoid(x W_alpha + b_alpha)                                   weight of the solve
    y     = RMSNorm(gated_kalmanet(q, k, v, g, alpha, beta)) SiLU(x W_g)   per head
    out   = y W_o

With `solve=False` there is no solve (alpha = 0): gated linear attention, otherwise the same layer.

With `kv_proj_rank` every query head has its own keys and values, expanded after the convolution (e is k or v; R
repeats the heads, or is learned, `k_rep` and `v_rep`):

    e <- R e + SiLU(e A^T) B^T      over heads; over channels, of all heads together

Legend: B batch, T time, H query heads, Hk key/value heads, D head dim of q, k and v, W width of the convolutions,
N packed sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops import State, gated_kalmanet, gated_kalmanet_step
from ..ops.autocast import autocast_off
from ..ops.checks import check_numbers, check_solver
from ..ops.solvers import RIDGE_RATIO
from ..ops.transforms import transforms_active
from .cache import LayerState, read_cache, write_cache
from .decay import DecayParameters
from .first_weights import fill_layer
from .gated_norm import GatedRMSNorm
from .gates import layer_gates
from .given_state import given_state, no_past
from .layer_checks import check_alone, check_call, check_counts, check_sizes
from .padding import RealFirst
from .part import PartOfBatch
from .projections import LowRank, expand_heads
from .short_conv import ShortConv, convolve, last_inputs, packing

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


class GatedKalmaNet(DecayParameters):
    """The Gated KalmaNet layer, [B, T, hidden_size] -> [B, T, hidden_size].

    Args:
        hidden_size: size of the last dim of input and output.
        num_heads: query heads H.
        num_kv_heads: key/value heads Hk, a divisor of H; None means H.
        head_dim: dim D of queries, keys and values of a head, at most 256; None means hidden_size / H.
        conv_size: width W of the causal depthwise convolutions of q, k and v.
        use_v_conv: whether v has a convolution too.
        use_alpha_connection: whether to use the alpha connection; without it alpha = 1.
        use_beta_gate: whether to use the write strength; without it beta = 1.
        use_forget_gate: whether the state decays; without it g = 0.
        use_output_gate: whether SiLU(x W_g) multiplies the normalised output.
        solve: whether to solve the ridge regression; False is gated linear attention, alpha = 0.
        ridge_ratio: a of the paper: lambda_t = a ||S_kk_t||_F, greater than 0.
        solver: "chebyshev" or "cg", conjugate gradient.
        solver_steps: steps of each stage of the solve, Chebyshev nodes such as [31] or [16, 16], or products of
            conjugate gradient such as [20] or [10, 10]; None means the default for the dtype of the input.
        tolerance: for "cg": the residual at which a stage ends, relative to its start, between 0 and 1; the steps
            are then an upper limit. None means that all steps are made.
        chunk_size: tokens per chunk; None means the default of the device. The result does not depend on it.
        kv_proj_rank: rank of a learned map that gives every query head its own keys and values, added to the
            repeated key/value heads; needs Hk < H. None means no such map.
        kv_learnable_residual: whether the repeated heads are learned mixtures of all heads; needs kv_proj_rank.
        norm_eps: epsilon of the RMSNorm of the output.
        initializer_range: standard deviation of the initial weights; None means 1 / sqrt(hidden_size).
        output_factor: factor of the initial weights of the output projection; a model of L blocks uses
            1 / sqrt(2 L).
        layer_idx: index of the layer in `past_key_values`; None for a layer that is called without a cache.
        device, dtype: device and dtype of the parameters.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, its value and the expected value.

    The names of the parameters are those of the published checkpoints. `A_log` and `dt_bias` have the attribute
    `_no_weight_decay = True`. With 16-bit weights, buffers keep the part of both that rounding leaves out
    (`gka.nn.decay`).

    Attributes:
        context_parallel: for layers whose tokens are spread over processes, the part of the batch that the next
            calls get (`gka.distributed`); None, the default, for whole rows.
    """

    context_parallel: PartOfBatch | None = None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        conv_size: int = 4,
        use_v_conv: bool = True,
        use_alpha_connection: bool = True,
        use_beta_gate: bool = True,
        use_forget_gate: bool = True,
        use_output_gate: bool = True,
        solve: bool = True,
        ridge_ratio: float = RIDGE_RATIO,
        solver: str = "chebyshev",
        solver_steps: Sequence[int] | None = None,
        tolerance: float | None = None,
        chunk_size: int | None = None,
        kv_proj_rank: int | None = None,
        kv_learnable_residual: bool = False,
        norm_eps: float = 1e-6,
        initializer_range: float | None = None,
        output_factor: float = 1.0,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts(hidden_size=hidden_size, num_heads=num_heads, conv_size=conv_size)
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"hidden_size is {hidden_size}; expected a multiple of num_heads, {num_heads}")
        self.hidden_size, self.layer_idx = hidden_size, layer_idx
        self.num_heads, self.num_kv_heads = num_heads, num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.conv_size, self.chunk_size, self.ridge_ratio = conv_size, chunk_size, ridge_ratio
        self.initializer_range, self.output_factor = initializer_range, output_factor
        check_sizes(self, kv_proj_rank, kv_learnable_residual)
        check_numbers(ridge_ratio=ridge_ratio, norm_eps=norm_eps, output_factor=output_factor)
        check_numbers(initializer_range=1.0 if initializer_range is None else initializer_range)
        self.solves = solve
        self.set_solver(solver, solver_steps, tolerance)
        hidden, H = hidden_size, num_heads
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, inner_kv = H * self.head_dim, self.num_kv_heads * self.head_dim

        self.q_proj = nn.Linear(hidden, inner, bias=False, **place)
        self.k_proj = nn.Linear(hidden, inner_kv, bias=False, **place)
        self.v_proj = nn.Linear(hidden, inner_kv, bias=False, **place)
        self.q_conv1d = ShortConv(inner, conv_size, **place)
        self.k_conv1d = ShortConv(inner_kv, conv_size, **place)
        self.v_conv1d = ShortConv(inner_kv, conv_size, **place) if use_v_conv else None
        self.a_proj = nn.Linear(hidden, H, bias=False, **place) if use_forget_gate else None
        if use_forget_gate:
            self.add_decay(H, device)
        self.b_proj = nn.Linear(hidden, H, **place) if use_beta_gate else None
        self.alpha_proj = nn.Linear(hidden, H, **place) if use_alpha_connection and solve else None
        self.g_proj = nn.Linear(hidden, inner, bias=False, **place) if use_output_gate else None
        rank, mixing, mixed = kv_proj_rank, (H, self.num_kv_heads), kv_learnable_residual
        self.proj_k = None if rank is None else LowRank(inner_kv, rank, inner, **place)
        self.proj_v = None if rank is None else LowRank(inner_kv, rank, inner, **place)
        self.k_rep = nn.Parameter(torch.empty(mixing, **place)) if mixed else None
        self.v_rep = nn.Parameter(torch.empty(mixing, **place)) if mixed else None
        self.o_norm = GatedRMSNorm(self.head_dim, norm_eps, **place)
        self.o_proj = nn.Linear(inner, hidden, bias=False, **place)
        self.reset_parameters()
        if dtype is not None or self.o_norm.weight.device.type != "meta":  # from_pretrained loads float32 there
            self.round_decay(self.o_norm.weight.dtype)

    @classmethod
    def from_config(cls, config: Any, layer_idx: int | None = None, **place: Any) -> GatedKalmaNet:
        """Make a layer from the configuration of a model.

        Args:
            config: a `gka.GKAConfig` with sizes, solver and switches.
            layer_idx: index of the layer in `past_key_values`.
            **place: device and dtype.

        Raises:
            ValueError: a field of the configuration is invalid.
        """
        config.check()
        return cls(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            conv_size=config.conv_size,
            use_v_conv=config.use_v_conv,
            use_alpha_connection=config.use_alpha_connection,
            use_beta_gate=config.use_beta_gate,
            use_forget_gate=config.use_forget_gate,
            use_output_gate=config.use_output_gate,
            solve=config.mixer == "gka",
            ridge_ratio=config.ridge_ratio,
            solver=config.solver,
            solver_steps=config.solver_steps,
            tolerance=config.tolerance,
            chunk_size=config.chunk_size,
            kv_proj_rank=config.kv_proj_rank,
            kv_learnable_residual=config.kv_learnable_residual,
            norm_eps=config.rms_norm_eps,
            initializer_range=config.initializer_range,
            output_factor=config.output_factor,
            layer_idx=layer_idx,
            **place,
        )

    def reset_parameters(self) -> None:
        """Set the initial weights, as a model does for its layers (`gka.nn.first_weights`)."""
        fill_layer(self)

    def set_solver_steps(self, solver_steps: Sequence[int] | None) -> None:
        """Change the solver steps from the next call on, and keep the solver and its tolerance (`set_solver`)."""
        self.set_solver(self.solver, solver_steps, self.tolerance)

    def set_solver(
        self, solver: str, solver_steps: Sequence[int] | None = None, tolerance: float | None = None
    ) -> None:
        """Change the solver from the next call on; the arguments are those of the constructor.

        A layer with `solve=False` has no solver: its steps stay ().

        Raises:
            ValueError: there is no such solver, or it has no tolerance; the tolerance is not between 0 and 1;
                solver_steps is empty, or has a value that is not an integer of at least 1.
        """
        check_solver(solver, tolerance)
        if not self.solves and (solver != "chebyshev" or tolerance is not None):
            raise ValueError(
                f"solver is {solver!r}, tolerance {tolerance}; expected the defaults with solve=False"
            )
        whole = isinstance(solver_steps, Sequence) and all(type(n) is int and n > 0 for n in solver_steps)
        if solver_steps is not None and not (whole and solver_steps):
            raise ValueError(
                f"solver_steps is {solver_steps!r}; expected None or integers of at least 1, such as [31] "
                "or [16, 16]"
            )
        self.solver, self.tolerance = solver, tolerance
        self.solver_steps = (None if solver_steps is None else tuple(solver_steps)) if self.solves else ()

    def extra_repr(self) -> str:
        """For `print`: what its modules do not show."""
        solve = f"solver={self.solver!r}, solver_steps={self.solver_steps}" if self.solves else "solve=False"
        if self.tolerance is not None:
            solve += f", tolerance={self.tolerance}"
        return (
            f"{self.hidden_size}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, conv_size={self.conv_size}, {solve}, layer_idx={self.layer_idx}"
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        state: LayerState | Sequence[Any] | None = None,
        return_state: bool = False,
        context_parallel: PartOfBatch | None = None,
    ) -> Tensor | tuple[Tensor, LayerState]:
        """Mix every token with the earlier tokens of its row.

        Args:
            hidden_states: [B, T, hidden_size], in the dtype of the weights; under autocast any float dtype.
            attention_mask: [B, T], any dtype, 0 for padding and 1 for a token. Padding may be anywhere. It does
                not change the other tokens or the cache, and its output is 0. Other values are an error; on a GPU
                this is an assertion of the device.
            past_key_values: a transformers cache, `DynamicCache(config=config)`. The rows continue from its states
                for this layer, and it is updated in place. Gradients flow through it.
            cu_seqlens: [N + 1] int32 or int64, for packed sequences in a single row: sequence n has the tokens
                from cu_seqlens[n] to cu_seqlens[n + 1] - 1.
            state: the state from an earlier call, to continue its rows; it is not changed. None means no past.
            return_state: whether to return the state after the last token.
            context_parallel: the part of a batch that hidden_states are, where processes share its tokens
                (`gka.distributed`); it knows the packed sequences. None means the attribute of the same name.

        Returns:
            [B, T, hidden_size] in the dtype of the weights, or in that of autocast. With `return_state` a pair of
            this tensor and a `LayerState` for the next call. Gradients flow through the state.

        Raises:
            TypeError, ValueError: an argument does not fit; packed sequences are combined with a mask, a cache or
                a state; a cache is combined with a state; a cache is given to a layer without layer_idx; a part of
                a batch is combined with cu_seqlens, a cache or a state.
        """
        part = self.context_parallel if context_parallel is None else context_parallel
        check_call(self, hidden_states, attention_mask, past_key_values, cu_seqlens)
        if part is not None:
            check_alone(
                cu_seqlens=cu_seqlens, past_key_values=past_key_values, state=state, return_state=return_state
            )
        past = given_state(self, state, return_state, hidden_states, past_key_values, cu_seqlens)
        if hidden_states.shape[1] == 0 and part is None:
            return (hidden_states, past or no_past(self, hidden_states)) if return_state else hidden_states
        rows = None if attention_mask is None else RealFirst(attention_mask, 1 if part is None else part.segments)
        if rows is not None:
            hidden_states = rows.compress(hidden_states)
        lengths = None if rows is None else rows.lengths
        if past_key_values is not None:
            past = read_cache(past_key_values, self._place, hidden_states.shape[0], self.solves)
        q, k, v, inputs = self._qkv(hidden_states, past, cu_seqlens, part, lengths)
        g, alpha, beta = self._gates(hidden_states, rows)
        cached = past_key_values is not None
        if part is None:
            o, last = self._op(q, k, v, g, alpha, beta, past, cu_seqlens, cached or return_state)
        else:
            with autocast_off(q.device):
                o, last = part.gated_kalmanet(
                    q, k, v, g, alpha, beta, **self._op_options(), chunk_size=self.chunk_size
                )
        new = None
        if last is not None and (cached or return_state):
            conv = [last_inputs(*x, self.conv_size, lengths) for x in inputs]
            if self.v_conv1d is None:
                conv.append(conv[1][..., :0])
            new = LayerState(conv, last)
        if past_key_values is not None and new is not None:
            write_cache(past_key_values, self._place, new)
        gate = None if self.g_proj is None else self.g_proj(hidden_states).view_as(o)
        out = self.o_proj(self.o_norm(o, gate).flatten(2))
        out = out if rows is None else rows.restore(out)
        return (out, new) if return_state and new is not None else out

    @property
    def _place(self) -> int:
        assert self.layer_idx is not None, "check_cache has seen to it"
        return self.layer_idx

    def _qkv(
        self,
        x: Tensor,
        past: LayerState | None,
        cu_seqlens: Tensor | None,
        part: PartOfBatch | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor | None]]]:
        """q [B, T, H, D], k and v [B, T, Hk or H, D], and the inputs of the convolutions for `last_inputs`."""
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        projected = [projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        packed = None if cu_seqlens is None else packing(projected[0], cu_seqlens, self.conv_size)
        states = [None if past is None or conv is None else past.conv[n] for n, conv in enumerate(convolutions)]
        if part is None:
            outputs = convolve(convolutions, projected, states, packed)
        else:
            outputs = part.convolve(convolutions, projected, lengths)
        q, k, v = (y.unflatten(2, (-1, self.head_dim)) for y in outputs)
        streams = zip(projected, states, convolutions, strict=True)
        inputs = [] if cu_seqlens is not None else [(y, state) for y, state, conv in streams if conv is not None]
        if self.proj_k is not None and self.proj_v is not None:
            k = expand_heads(k, self.num_heads, self.proj_k, self.k_rep)
            v = expand_heads(v, self.num_heads, self.proj_v, self.v_rep)
        return q, k, v, inputs

    def _gates(self, x: Tensor, rows: RealFirst | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """g, alpha and beta, [B, T, H] each, in at least 32 bits; at padding g = 0 and beta = 0."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        real = None if rows is None else rows.real
        forgets = self.a_proj is not None
        A_log, dt_bias = (self.decay_parameter(name, wide) if forgets else None for name in ("A_log", "dt_bias"))
        projections = (self.a_proj, self.b_proj, self.alpha_proj)
        g, beta, alpha = layer_gates(x, projections, A_log, dt_bias, real)
        if g is None:
            g = x.new_zeros(*x.shape[:2], self.num_heads, dtype=wide)
        if beta is None and real is not None:
            beta = real.unsqueeze(2).to(wide).expand_as(g)
        return g, alpha, beta

    def _op_options(self) -> dict[str, Any]:
        return dict(
            ridge_ratio=self.ridge_ratio, solver=self.solver, solver_steps=self.solver_steps,
            tolerance=self.tolerance, normalize_qk=True,
        )  # fmt: skip

    def _op(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        alpha: Tensor | None,
        beta: Tensor | None,
        past: LayerState | None,
        cu_seqlens: Tensor | None,
        state_wanted: bool,
    ) -> tuple[Tensor, State | None]:
        """o [B, T, H, D] in the dtype of q and, if requested, the state after the last token."""
        options = self._op_options()
        with autocast_off(q.device):  # dtypes are explicit from here on
            if past is not None and q.shape[1] == 1:
                token: list[Any] = [None if x is None else x[:, 0] for x in (q, k, v, g, alpha, beta)]
                # Else `read_cache` copied the states.
                inplace = not torch.is_grad_enabled() and not transforms_active()
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
