"""The operation: every token solves a ridge regression over its past (arXiv 2511.21016, section 4).

    S_kk_t = e^{g_t} S_kk_{t-1} + beta_t^2 k_t k_t^T      S_kv_t = e^{g_t} S_kv_{t-1} + beta_t^2 k_t v_t^T
    x_t = (S_kk_t + a ||S_kk_t||_F I)^{-1} q_t            y_t = q_t + alpha_t (x_t - q_t)
    o_t = scale * y_t^T S_kv_t

`gated_kalmanet` processes whole sequences. `gated_kalmanet_step` processes one token, given the state of the
earlier tokens. Both check their arguments once and pass them as one object, `types.Arguments`, to the backend
that `backends` chooses.

Legend: B batch, T time, H query heads, Hk key/value heads (H a multiple of Hk), D key dim, V value dim,
N sequences (B, or the number of sequences in a packed batch).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import custom_op
from .backends import backend_for, step_backend_for
from .checks import (
    check_cu_seqlens,
    check_decay,
    check_numbers,
    check_same_device,
    check_state_indices,
    check_tokens,
    checked_plan,
    checked_state,
)
from .plan import SolverName
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
    solver: SolverName = "chebyshev",
    solver_steps: Sequence[int] | None = None,
    tolerance: float | None = None,
    scale: float | None = None,
    initial_state: State | Sequence[Tensor | None] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    normalize_qk: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """Gated KalmaNet over whole sequences (paper, section 4). The docstring of the module has the equations.

    Args:
        q: queries [B, T, H, D], 1 <= D <= 256; float64, float32, bfloat16 or float16.
        k: keys [B, T, Hk, D], dtype of q.
        v: values [B, T, Hk, V], dtype of q.
        g: log-decay [B, T, H], any float dtype, at most 0; -inf forgets the past.
        alpha: weight of the solve [B, T, H], any float dtype, usually in [0, 1], which is not checked; None
            means 1. With alpha = 0 the output is that of gated linear attention.
        beta: write strength [B, T, H], any float dtype; it multiplies k and v of every query head. None
            means 1. A token with beta = 0 and g = 0 leaves the state exactly unchanged; use this for
            padding.
        ridge_ratio: a > 0; lambda_t = a ||S_kk_t||_F, so the condition number is at most (1 + a) / a.
        solver: "chebyshev", the paper's fixed polynomial, or "cg", conjugate gradient, which needs about two
            thirds of the products for the same error (docs/choosing.md).
        solver_steps: steps of each stage of the solve (section 4.2): Chebyshev nodes, or products of conjugate
            gradient. (31,) nodes are the paper's 30 iterations, (16, 16) is two stages with one refinement. None
            means (31,) nodes or (20,) products for 32- and 64-bit inputs, (16, 16) or (10, 10) for 16-bit inputs.
            () means no solve: gated linear attention, y = q, S_kk is None.
        tolerance: for "cg": a stage ends when the residual of every token of the chunk is at most `tolerance`
            times its residual at the start of the stage, 0 < tolerance < 1; `solver_steps` is then the largest
            number of products, by default (64,), or (32, 32) for 16-bit inputs. None means a fixed number.
        scale: factor of the output; None means D ** -0.5.
        initial_state: states before the first token, a State or any pair (S_kk, S_kv), float32 (float64 for
            float64 inputs); S_kk must be symmetric. None means zero.
        output_final_state: whether to return the states after the last token.
        cu_seqlens: [N + 1] int32 or int64, for packed sequences in a batch with B = 1: sequence n has the tokens
            from cu_seqlens[n] to cu_seqlens[n + 1] - 1. Values rise from 0 to T and may repeat.
        chunk_size: tokens per chunk; None means the default of the device. The result does not depend on it, but
            within a tolerance, because the tokens of a chunk stop together.
        normalize_qk: whether to divide q and k by (their Euclidean norm + 1e-6) first, in 32 or 64 bits.
        backend: "triton" (kernels for NVIDIA GPUs: bfloat16 and float16 up to D = 128, float32 up to 64),
            "chunked" (PyTorch, any device), "differentiable" (the same, recorded by autograd: more memory) or
            "reference" (float64 token loop, slow). None chooses "triton" if it supports the tensors, otherwise
            "chunked"; "differentiable" for the derivatives below.

    Returns:
        o [B, T, H, V] in the dtype of q, and the final State or None. All floating inputs and both initial
        states have gradients; the gradient of S_kk is symmetric. The gradient of the solve is implicit
        (section 4.3). If S_kk is zero, x = 0 without a gradient. A norm ||S_kk||_F below 1e-12 counts as 1e-12,
        so the output of a faded state goes to 0 (docs/math.md).

    Derivatives:
        The backend "differentiable" computes forward mode, the transforms of torch.func, torch.vmap (all samples
        share cu_seqlens) and gradients of gradients (create_graph=True).

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a shape, size or value does not fit. Values of tensors (g <= 0, cu_seqlens) are always
            checked on the CPU. On a GPU, where the check must wait for the device, they are checked only if
            the environment variable GKA_CHECK_VALUES is 1.
    """
    check_tokens(q, k, v, g, alpha, beta, "[B, T, H, D]")
    (B, T, H, D), V = q.shape, v.shape[3]
    N = B
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, B, T)
        N = cu_seqlens.shape[0] - 1
    plan = checked_plan(solver, solver_steps, tolerance, q.dtype)
    check_numbers(ridge_ratio=ridge_ratio)
    check_same_device(q, k=k, v=v, g=g, alpha=alpha, beta=beta, cu_seqlens=cu_seqlens)
    if initial_state is not None:
        initial_state = checked_state("initial_state", initial_state, N, H, D, V, plan.solver_steps, q)
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
        solver_steps=plan.solver_steps,
        scale=D**-0.5 if scale is None else float(scale),
        normalize_qk=normalize_qk,
        chunk_size=chunk_size,
        solver=plan.solver,
        tolerance=plan.tolerance,
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
    state_indices: Tensor | None = None,
    ridge_ratio: float = RIDGE_RATIO,
    solver: SolverName = "chebyshev",
    solver_steps: Sequence[int] | None = None,
    tolerance: float | None = None,
    scale: float | None = None,
    normalize_qk: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, State]:
    """Gated KalmaNet for one token of every sequence, as in decoding (paper, section 4.1).

    The result equals `gated_kalmanet` with T = 1 and `initial_state=state`.

    Args:
        q: [B, H, D]; k: [B, Hk, D]; v: [B, Hk, V]; g, alpha, beta: [B, H]; dtypes and ranges as in
            `gated_kalmanet`.
        state: the states before the token, a State or any pair of S_kk [B, H, D, D] (None with
            `solver_steps=()`) and S_kv [B, H, D, V]. Both are float32 (float64 for float64 inputs), or both are
            bfloat16 (not for float64 inputs). bfloat16 needs half the memory and traffic; each update is rounded
            when it is stored. The arithmetic stays float32, and o uses the update before the rounding. bfloat16
            states need decays of about -0.01 or stronger: a weaker decay is lost in the rounding, and the state
            becomes wrong (docs/reliability.md).
        state_indices: [B] int32 or int64, for states in a pool (`gka.ops.pool`): `state` then has N rows, and
            row b of the inputs reads and writes row state_indices[b]. An index below 0 is padding: nothing is
            written, and o[b] is 0. Each row of the pool must be contiguous; there may be gaps between rows. Two
            equal indices of at least 0 are undefined, and so is on a GPU an index of N or more. It needs
            inplace=True. None means that row b has the state b.
        ridge_ratio, solver, solver_steps, tolerance, scale, normalize_qk: as in `gated_kalmanet`.
        inplace: whether to write the new states over `state` and return the same tensors. False leaves `state`
            unchanged. In-place calls have no gradients.

    Returns:
        o [B, H, V] in the dtype of q, and the new State in the dtype of `state`. On an NVIDIA GPU one kernel does
        the whole step if no gradient is needed (all dtypes except float64, D up to 128). The derivatives are those
        of `gated_kalmanet`.

    Raises:
        TypeError: as `gated_kalmanet`.
        ValueError: as `gated_kalmanet`, or `inplace` is True and gradients are needed or a transform is active;
            `state_indices` is given and `inplace` is False, or a row of the pool is not contiguous; on the CPU, an
            index of N or more.
    """
    check_tokens(q, k, v, g, alpha, beta, "[B, H, D]")
    (B, H, D), V = q.shape, v.shape[2]
    plan = checked_plan(solver, solver_steps, tolerance, q.dtype)
    check_numbers(ridge_ratio=ridge_ratio)
    check_same_device(q, k=k, v=v, g=g, alpha=alpha, beta=beta)
    rows = B if state_indices is None else None
    state = checked_state("state", state, rows, H, D, V, plan.solver_steps, q, may_be_bfloat16=True)
    if state_indices is not None:
        check_state_indices(state_indices, state.S_kv)
        if state_indices.shape[0] != B:
            raise ValueError(
                f"state_indices has shape {tuple(state_indices.shape)}; expected [{B}], a row of q each"
            )
        if not inplace:
            raise ValueError(
                "state_indices is given and inplace is False; expected inplace=True, to write the pool"
            )
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
        solver_steps=plan.solver_steps,
        scale=D**-0.5 if scale is None else float(scale),
        normalize_qk=normalize_qk,
        solver=plan.solver,
        tolerance=plan.tolerance,
    )
    if inplace and transforms_active():
        raise ValueError(
            "inplace=True writes over the states, and a transform of torch.func or forward mode is active; "
            "leave inplace out"
        )
    if inplace and arguments.needs_gradient():
        raise ValueError(
            "inplace=True overwrites the states, but an argument requires a gradient; "
            "call under torch.no_grad() or leave inplace out"
        )
    return step_backend_for(arguments)(arguments, inplace=inplace, state_indices=state_indices)
