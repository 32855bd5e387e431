"""One step of the selective scan, for decoding: `tossup.selective_scan` of a single token.

state = exp(dt A) state + dt x B
out = (<C, state> + D x) silu(z)
"""

import torch
from torch import Tensor

from ..backend import Impl, resolve_for
from ..checks import check_floating, check_shapes
from ..routing import Route, put, rows_of, take, tensors_of
from .reference import selective_state_update_reference

__all__ = ["selective_state_update"]


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    route: Route | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Advance the state by one token, in place, and return the token's output.

    state: (batch, dim, state), overwritten; any floating dtype and strides without overlap.
    x: (batch, dim), the input; dt: (batch, dim), the step sizes.
    A: (dim, state), real. B, C: (batch, groups, state): channel d reads group d * groups // dim;
        the numbers of groups are independent.
    D: (dim,), the skip weight. z: (batch, dim), the gate. dt_bias: (dim,), added to dt. Each may be
        None, for none.
    dt_softplus: pass dt + dt_bias through softplus.
    route: the samples to work on. The rows of others are left as they are in state, and unwritten
        in the result. None is all.

    Returns out, (batch, dim) in x's dtype. Without gradients. Arithmetic is in float32, or in
    float64 where x is float64. Deterministic.
    Raises ValueError where a shape or a dtype is not as above.
    """
    check(state, x, dt, A, B, C, D, z, dt_bias)
    tensors, routed = (state, x, dt, A, B, C, D, z, dt_bias), tensors_of(route, x.shape[0])
    chosen = resolve_for(impl, *tensors, *routed)
    with torch.no_grad():
        if chosen != "reference":
            from .ops import selective_state_update_op

            return selective_state_update_op(*tensors, dt_softplus, *routed, chosen)
        rows = rows_of(*routed)
        before, token, step, b, c = (take(route, t) for t in (state, x, dt, B, C))
        out, after = selective_state_update_reference(
            before, token, step, A, b, c, D, take(route, z), dt_bias, dt_softplus
        )
        state[rows] = after
        return put(route, out, len(x))


def check(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> None:
    if state.ndim != 3 or 0 in state.shape[1:]:
        raise ValueError(f"state must be (batch, dim, state), got {tuple(state.shape)}")
    batch, dim, states = state.shape
    check_shapes(
        x=(x, (batch, dim)),
        dt=(dt, (batch, dim)),
        A=(A, (dim, states)),
        D=(D, (dim,)),
        z=(z, (batch, dim)),
        dt_bias=(dt_bias, (dim,)),
    )
    for name, tensor in (("B", B), ("C", C)):
        groups = tensor.shape[1] if tensor.ndim == 3 else 0
        if tensor.shape != (batch, groups, states) or groups == 0 or dim % groups:
            raise ValueError(
                f"{name} must be (batch, groups, state) = ({batch}, groups, {states}) with groups "
                f"dividing dim = {dim}, got {tuple(tensor.shape)}"
            )
    check_floating(state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
