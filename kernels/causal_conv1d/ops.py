"""torch.library registration: schema, shapes for tracing, gradients."""

import torch
from torch import Tensor

from ..backend import call_backend
from ..library import differentiable, mutating_op
from ..routing import snapshot


@torch.library.custom_op("tossup::causal_conv1d", mutates_args=())
def causal_conv1d_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
    activation: str | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return call_backend(
        __package__, impl, "forward",
        x, weight, bias, initial_state, seq_idx, count, samples, activation
    )  # fmt: skip


@causal_conv1d_op.register_fake
def _(x, weight, *others):
    return x.new_empty(x.shape), x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2]))


@torch.library.custom_op("tossup::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward_op(
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
    activation: str | None,
    impl: str,
) -> list[Tensor]:
    """The gradients of x to initial_state, empty for those that are None."""
    gradients = call_backend(
        __package__, impl, "backward",
        dout, dfinal_state, x, weight, bias, initial_state, seq_idx, count, samples, activation
    )  # fmt: skip
    return [dout.new_empty(0) if gradient is None else gradient for gradient in gradients]


@causal_conv1d_backward_op.register_fake
def _(dout, dfinal_state, x, weight, bias, initial_state, *others):
    differentiable = (x, weight, bias, initial_state)
    return [dout.new_empty(0) if t is None else t.new_empty(t.shape) for t in differentiable]


@mutating_op("causal_conv1d_into", mutates_args=("out",))
def causal_conv1d_into_op(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
    activation: str | None,
    impl: str,
) -> None:
    """The forward pass into given memory of any strides."""
    call_backend(
        __package__, impl, "forward",
        x, weight, bias, None, seq_idx, count, samples, activation, out
    )  # fmt: skip


@mutating_op("causal_conv1d_backward_into", mutates_args=("dx",))
def causal_conv1d_backward_into_op(
    dx: Tensor,
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
    activation: str | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias, the latter empty if there is none; that of x into dx."""
    _, dweight, dbias, _ = call_backend(
        __package__, impl, "backward",
        dout, None, x, weight, bias, None, seq_idx, count, samples, activation, dx
    )  # fmt: skip
    return dweight, dout.new_empty(0) if dbias is None else dbias


@causal_conv1d_backward_into_op.register_fake
def _(dx, dout, x, weight, bias, *others):
    return weight.new_empty(weight.shape), dout.new_empty(0) if bias is None else bias.new_empty(
        bias.shape
    )


def save_for_backward(ctx, inputs, output):
    *tensors, count, samples, activation, impl = inputs
    ctx.save_for_backward(*tensors, *snapshot(count, samples))
    ctx.activation, ctx.impl = activation, impl
    ctx.set_materialize_grads(False)


def differentiate(ctx, dout, dfinal_state):
    inputs = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(inputs[0])
    gradients = causal_conv1d_backward_op(dout, dfinal_state, *inputs, ctx.activation, ctx.impl)
    present = (g if x is not None else None for g, x in zip(gradients, inputs, strict=False))
    return *present, None, None, None, None, None


apply = differentiable(causal_conv1d_op, save_for_backward, differentiate)
