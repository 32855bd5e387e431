"""torch.library registration: schema, shapes for tracing, gradients."""

import torch
from torch import Tensor

from ..backend import call_backend
from ..library import differentiable, mutating_op
from ..routing import snapshot


@torch.library.custom_op("tossup::linear", mutates_args=())
def linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
    impl: str,
) -> Tensor:
    return call_backend(__package__, impl, "forward", x, weight, bias, count, samples)


@linear_op.register_fake
def _(x, weight, *others):
    return x.new_empty((*x.shape[:2], weight.shape[0]))


@mutating_op("linear_into", mutates_args=("out",))
def linear_into_op(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    accumulate: bool,
    count: Tensor | None,
    samples: Tensor | None,
    impl: str,
) -> None:
    call_backend(
        __package__, impl, "forward_into", out, x, weight, bias, accumulate, count, samples
    )


@mutating_op("linear_weight_gradient_into", mutates_args=("grad", "bias_grad"))
def linear_weight_gradient_into_op(
    grad: Tensor,
    dout: Tensor,
    x: Tensor,
    bias_grad: Tensor | None,
    written: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
    impl: str,
) -> None:
    call_backend(
        __package__, impl, "weight_gradient_into",
        grad, dout, x, bias_grad, written, count, samples
    )  # fmt: skip


@torch.library.custom_op("tossup::linear_backward", mutates_args=())
def linear_backward_op(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
    impl: str,
) -> list[Tensor]:
    """The gradients of weight and, if there is one, of bias."""
    gradients = [t.new_zeros(t.shape) for t in (weight, bias) if t is not None]
    grad, bias_grad = gradients[0], gradients[1] if bias is not None else None
    call_backend(
        __package__, impl, "weight_gradient_into",
        grad, dout, x, bias_grad, None, count, samples
    )  # fmt: skip
    return gradients


@linear_backward_op.register_fake
def _(dout, x, weight, bias, *others):
    return [t.new_empty(t.shape) for t in (weight, bias) if t is not None]


def save_for_backward(ctx, inputs, output):
    *tensors, count, samples, impl = inputs
    ctx.save_for_backward(*tensors, *snapshot(count, samples))
    ctx.impl = impl


def differentiate(ctx, dout):
    """The data gradient is this op again, of the transposed weight."""
    x, weight, bias, *route = ctx.saved_tensors
    of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
    dx = dweight = dbias = None
    if of_x:
        dx = apply(dout, weight.t(), None, *route, ctx.impl)
    if of_weight or of_bias:
        bias = bias if of_bias else None
        dweight, dbias = (*linear_backward_op(dout, x, weight, bias, *route, ctx.impl), None)[:2]
    return dx, dweight, dbias, None, None, None


apply = differentiable(linear_op, save_for_backward, differentiate)
