"""torch.library registration: schema, shapes for tracing, gradients."""

import torch
from torch import Tensor

from ..backend import call_backend
from ..library import differentiable, mutating_op
from ..routing import snapshot


@torch.library.custom_op("tossup::rotary", mutates_args=())
def rotary_op(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    count: Tensor | None,
    samples: Tensor | None,
    impl: str,
) -> Tensor:
    return call_backend(__package__, impl, "forward", x, cos, sin, interleaved, count, samples)


@rotary_op.register_fake
def _(x, cos, sin, interleaved, count, samples, impl):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@mutating_op("rotary_", mutates_args=("x",))
def rotary_in_place_op(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    count: Tensor | None,
    samples: Tensor | None,
    impl: str,
) -> None:
    call_backend(__package__, impl, "forward", x, cos, sin, interleaved, count, samples, x)


def save_for_backward(ctx, inputs, output):
    _, cos, sin, interleaved, count, samples, impl = inputs
    ctx.save_for_backward(cos, sin, *snapshot(count, samples))
    ctx.options = interleaved, impl


def differentiate(ctx, dout):
    """The rotation by the opposite angle, which is this op again."""
    cos, sin, count, samples = ctx.saved_tensors
    interleaved, impl = ctx.options
    dx = apply(dout, cos, -sin, interleaved, count, samples, impl)
    return dx, *(None,) * 6


apply = differentiable(rotary_op, save_for_backward, differentiate, twice=True)
