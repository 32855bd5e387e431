"""torch.library registration: schema, shapes for tracing. The state is the op's to overwrite."""

from torch import Tensor

from ..backend import call_backend
from ..library import mutating_op


@mutating_op("selective_state_update", mutates_args=("state",))
def selective_state_update_op(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    count: Tensor | None,
    samples: Tensor | None,
    impl: str,
) -> Tensor:
    return call_backend(
        __package__, impl, "update",
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, count, samples
    )  # fmt: skip


@selective_state_update_op.register_fake
def _(state, x, *others):
    return x.new_empty(x.shape)
