"""torch.library registration: schema, shapes for tracing. The state is the op's to overwrite."""

from torch import Tensor

from ..backend import call_backend
from ..library import mutating_op


@mutating_op("causal_conv1d_update", mutates_args=("conv_state",))
def causal_conv1d_update_op(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
    impl: str,
) -> Tensor:
    return call_backend(
        __package__, impl, "update",
        x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, count, samples
    )  # fmt: skip


@causal_conv1d_update_op.register_fake
def _(x, *others):
    return x.new_empty(x.shape)
