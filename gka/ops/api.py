"""The operation: every token solves a ridge regression over its past (arXiv 2511.21016, section 4).

    S_kk_t = e^{g_t} S_kk_{t-1} + beta_t^2 k_t k_t^T      S_kv_t = e^{g_t} S_kv_{t-1} + beta_t^2 k_t v_t^T
    x_t = (S_kk_t + a ||S_kk_t||_F I)^{-1} q_t            y_t = q_t + alpha_t (x_t - q_t)
    o_t = scale * y_t^T S_kv_t

`gated_kalmanet` takes whole sequences, `gated_kalmanet_step` one token with the state so far. The arguments
are checked here, once, and travel as one object, `types.Arguments`, to the backend that `backends` chooses.

Legend: B batch, T time, H query heads, Hk key/value heads (H a multiple of Hk), D key dim, V value dim,
N sequences: B, or those of a packed batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import custom_op
from .backends import backend_for, step_backend_for
from .checks import (
    check_cu_seqlens,
    check_decay,
    check_dims,
    check_floats,
    check_heads_and_dims,
    check_numbers,
    check_same_device,
    check_same_dtype,
    check_shapes,
    checked_solver_steps,
    checked_state,
)
from .solvers import RIDGE_RATIO
from .transforms import transforms_active
from .types import Arguments, State


def gated_kalmanet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    ridge_ratio: float = RIDGE_RATIO,
    solver_steps: Sequence[int] | None = None,
    scale: float | None = None,
    initial_state: State | Sequence[Tensor | None] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    normalize_qk: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """Gated KalmaNet over whole sequences (paper, section 4; see the module's docstring for the equations).

    Args:
        q: queries [B, T, H, D], 1 <= D <= 256; float64, float32, bfloat16 or float16.
        k: keys [B, T, Hk, D], dtype of q.
        v: values [B, T, Hk, V], dtype of q.
        g: log-decay [B, T, H], any float dtype, at most 0; -inf forgets the past.
        alpha: weight of the solve [B, T, H] in [0, 1], any float dtype; None means 1. At 0 a token reads
            like gated linear attention.
        beta: write strength [B, T, H], any float dtype; it multiplies k and v of every query head. None
            means 1. A token with beta = 0 and g = 0 leaves the state exactly as it was: that is how
            padding is passed.
        ridge_ratio: a > 0; lambda_t = a ||S_kk_t||_F, so the condition number is at most (1 + a) / a.
        solver_steps: Chebyshev nodes of each stage of the solve (section 4.2): (31,) is the paper's 30
            iterations, (16, 16) two stages with one refinement. None means (31,) for 32- and 64-bit inputs and
            (16, 16) for 16-bit ones. () solves nothing: gated linear attention, y = q, and S_kk is None.
        scale: factor of the output; None means D ** -0.5.
        initial_state: states before the first token, a State or any pair (S_kk, S_kv), float32 (float64 for
            float64 inputs); S_kk symmetric. None means zero.
        output_final_state: whether the states after the last token are returned.
        cu_seqlens: [N + 1] int32 or int64, for packed sequences: sequence n is tokens cu_seqlens[n] to
            cu_seqlens[n + 1] of a batch with B = 1; from 0 to T, not decreasing.
        chunk_size: tokens per chunk; None means what suits the device. The result does not depend on it.
        normalize_qk: whether q and k are divided by (their Euclidean norm + 1e-6) first, in 32 or 64 bits.
        backend: "triton" (kernels for NVIDIA GPUs: bfloat16 up to D = 128, float32 and float16 up to 64),
            "chunked" (PyTorch, any device), "differentiable" (the same, recorded by autograd: more memory) or
            "reference" (float64 token loop, slow). None takes the first that serves the tensors.

    Returns:
        o [B, T, H, V] in q's dtype, and the final State or None. All floating inputs and both initial states
        have gradients; that of S_kk is symmetric. The solve is differentiated implicitly (section 4.3).
        Where S_kk is zero, x = 0 without a gradient.

    Derivatives:
        Forward mode, the transforms of torch.func, torch.vmap (cu_seqlens is shared by all samples) and gradients
        of gradients (create_graph=True) are computed by "differentiable".

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a shape, size or value does not fit. Values of tensors (g <= 0, cu_seqlens) are
            checked on the CPU always, and where that would make a GPU wait only if the environment
            variable GKA_CHECK_VALUES is 1.
    """
    check_floats(q=q, k=k, v=v, g=g, alpha=alpha, beta=beta)
    check_same_dtype(q, k=k, v=v)
    check_dims(q, 4, "[B, T, H, D]")
    B, T, H, D = q.shape
    check_heads_and_dims(k, v, H, D, 2)
    Hk, V = v.shape[2:]
    check_shapes({"k": (k, (B, T, Hk, D)), "v": (v, (B, T, Hk, V))})
    check_shapes({name: (x, (B, T, H)) for name, x in (("g", g), ("alpha", alpha), ("beta", beta))})
    N = B
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, B, T)
        N = cu_seqlens.shape[0] - 1
    stages = checked_solver_steps(solver_steps, q.dtype)
    check_numbers(ridge_ratio=ridge_ratio)
    check_same_device(q, k=k, v=v, g=g, alpha=alpha, beta=beta, cu_seqlens=cu_seqlens)
    if initial_state is not None:
        initial_state = checked_state("initial_state", initial_state, N, H, D, V, stages, q)
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size is {chunk_size!r}; expected an integer of at least 1, or None")
    check_decay(g)
    S_kk, S_kv = (None, None) if initial_state is None else initial_state
    arguments = Arguments(
        q,
        k,
        v,
        g,
        alpha,
        beta,
        S_kk,
        S_kv,
        cu_seqlens,
        ridge_ratio=float(ridge_ratio),
        solver_steps=stages,
        scale=D**-0.5 if scale is None else float(scale),
        normalize_qk=normalize_qk,
        chunk_size=chunk_size,
    )
    chosen = backend_for(arguments, backend)
    return custom_op.gated_kalmanet(arguments, backend=chosen, output_final_state=output_final_state)


def gated_kalmanet_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    state: State | Sequence[Tensor | None],
    ridge_ratio: float = RIDGE_RATIO,
    solver_steps: Sequence[int] | None = None,
    scale: float | None = None,
    normalize_qk: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, State]:
    """Gated KalmaNet for one token of every sequence, as in decoding (paper, section 4.1).

    The same numbers as `gated_kalmanet` with T = 1 and `initial_state=state`.

    Args:
        q: [B, H, D]; k: [B, Hk, D]; v: [B, Hk, V]; g, alpha, beta: [B, H]; dtypes and ranges as there.
        state: the states so far, a State or any pair, S_kk [B, H, D, D] (None with `solver_steps=()`) and S_kv
            [B, H, D, V], both float32 (float64 for float64 inputs) or, except for float64 inputs, both
            bfloat16: half the memory and traffic, each update rounded when it is stored. The arithmetic is
            float32 all the same, and o is made of the update before it is rounded. bfloat16 states need decays
            of about -0.01 or stronger: weaker ones round to none, and the state no longer follows
            (docs/reliability.md).
        ridge_ratio, solver_steps, scale, normalize_qk: as in `gated_kalmanet`.
        inplace: whether the new states are written over `state`, whose tensors are then those returned; without,
            they are left as they were. There are no gradients in place.

    Returns:
        o [B, H, V] in q's dtype, and the new State in the dtype of `state`. On an NVIDIA GPU, where no gradient is
        asked for, one kernel does all of it (all dtypes but float64, D up to 128). It has derivatives of every
        kind, as `gated_kalmanet`.

    Raises:
        TypeError: as `gated_kalmanet`.
        ValueError: as `gated_kalmanet`, or `inplace` where gradients are needed or a transform is active.
    """
    check_floats(q=q, k=k, v=v, g=g, alpha=alpha, beta=beta)
    check_same_dtype(q, k=k, v=v)
    check_dims(q, 3, "[B, H, D]")
    B, H, D = q.shape
    check_heads_and_dims(k, v, H, D, 1)
    Hk, V = v.shape[1:]
    check_shapes({"k": (k, (B, Hk, D)), "v": (v, (B, Hk, V))})
    check_shapes({name: (x, (B, H)) for name, x in (("g", g), ("alpha", alpha), ("beta", beta))})
    stages = checked_solver_steps(solver_steps, q.dtype)
    check_numbers(ridge_ratio=ridge_ratio)
    check_same_device(q, k=k, v=v, g=g, alpha=alpha, beta=beta)
    state = checked_state("state", state, B, H, D, V, stages, q, may_be_bfloat16=True)
    check_decay(g)
    arguments = Arguments(
        q,
        k,
        v,
        g,
        alpha,
        beta,
        *state,
        cu_seqlens=None,
        ridge_ratio=float(ridge_ratio),
        solver_steps=stages,
        scale=D**-0.5 if scale is None else float(scale),
        normalize_qk=normalize_qk,
    )
    if inplace and transforms_active():
        raise ValueError(
            "inplace=True writes over the states, and a transform of torch.func or forward mode is active; "
            "leave inplace out"
        )
    if inplace and arguments.needs_gradient():
        raise ValueError(
            "inplace=True writes over the states, and an argument requires a gradient; "
            "call under torch.no_grad() or leave inplace out"
        )
    return step_backend_for(arguments)(arguments, inplace=inplace)
