"""Selective scan, the recurrence of Mamba-1 (Gu and Dao 2023, arXiv:2312.00752).

For every channel d, with its diagonal state matrix A[d] and its groups of B and C:

    h[t] = exp(delta[t] A) h[t-1] + delta[t] u[t] B[t]
    y[t] = <C[t], h[t]> + D u[t]
    out[t] = y[t] silu(z[t])

This is their equation 2 with the discretisation of section 3.6: A by zero-order hold, B by Euler.
"""

from torch import Tensor

from ..backend import Impl, resolve_for
from ..checks import check_floating, check_seq_idx, check_shapes
from ..routing import Route, put, take, tensors_of
from .reference import selective_scan_reference

__all__ = ["selective_scan"]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
    route: Route | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan every channel along the sequence, from the first token to the last.

    u: (batch, seqlen, dim), the input; float16, bfloat16, float32 or float64.
    delta: (batch, seqlen, dim), the step sizes.
    A: (dim, state), real.
    B: (batch, seqlen, groups of B, state), of which channel d reads group d * groups // dim; or
        (dim, state), the same for every token.
    C: (batch, seqlen, groups of C, state) or (dim, state), likewise and independently of B.
    D: (dim,), the skip weight. None adds no skip.
    z: (batch, seqlen, dim), the gate. None leaves the output ungated.
    delta_bias: (dim,), added to delta before the softplus.
    delta_softplus: pass delta through softplus, which is the identity above 20.
    initial_state: (batch, dim, state), the state before the first token. None is zero.
    seq_idx: (batch, seqlen), integers, the packed sequence that each token belongs to. The state is
        set to zero wherever it changes; the initial state belongs to the first sequence.
    return_final_state: also return the state after the last token.
    route: the samples to work on. The rows of others are left unwritten in all results and in
        gradients with a batch, and add nothing to the gradients of those without. None is all
        samples.

    Returns out, like u, or (out, final_state) with final_state (batch, dim, state). All floating
    inputs may differ in dtype, and have gradients, which flow from the final state too. Arithmetic
    and the final state are in float32, or in float64 where u is float64. Deterministic, forward and
    backward. Tensors of any strides are taken as they are.
    Raises ValueError where a shape or a dtype is not as above; for impl="triton" also above 256
    states.
    """
    check(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx)
    routed = tensors_of(route, u.shape[0])
    chosen = resolve_for(impl, *tensors, *routed)
    if chosen == "reference":
        b, c = (w if w.ndim == 2 else take(route, w) for w in (B, C))
        x, step = (take(route, t) for t in (u, delta))
        gate, first, index = (take(route, t) for t in (z, initial_state, seq_idx))
        rows = selective_scan_reference(
            x, step, A, b, c, D, gate, delta_bias, delta_softplus, first, index
        )
        out, final_state = (put(route, r, len(u)) for r in rows)
    else:
        from .ops import apply

        out, final_state, _ = apply(*tensors, *routed, delta_softplus, chosen)
    return (out, final_state) if return_final_state else out


def check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    if u.ndim != 3 or 0 in u.shape[1:] or not u.is_floating_point():
        raise ValueError(
            "u must be (batch, seqlen, dim), floating, with at least one token and one channel, "
            f"got {tuple(u.shape)} of {u.dtype}"
        )
    batch, seqlen, dim = u.shape
    if A.ndim != 2 or A.shape[0] != dim or not A.is_floating_point():
        raise ValueError(
            f"A must be (dim, state) = ({dim}, state), real, got {tuple(A.shape)} of {A.dtype}"
        )
    states = A.shape[1]
    for name, tensor in (("B", B), ("C", C)):
        wanted = (batch, seqlen, tensor.shape[2] if tensor.ndim == 4 else 0, states)
        if tensor.ndim == 2 and tensor.shape == A.shape:
            continue
        if tensor.shape != wanted or wanted[2] == 0 or dim % wanted[2] != 0:
            raise ValueError(
                f"{name} must be (batch, seqlen, groups, state) = ({batch}, {seqlen}, groups, "
                f"{states}) with groups dividing dim = {dim}, or (dim, state), got "
                f"{tuple(tensor.shape)}"
            )
    check_shapes(
        delta=(delta, u.shape),
        D=(D, (dim,)),
        z=(z, u.shape),
        delta_bias=(delta_bias, (dim,)),
        initial_state=(initial_state, (batch, dim, states)),
    )
    check_floating(
        delta=delta, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state
    )
    check_seq_idx(seq_idx, batch, seqlen)
