"""torch.library registration: schema, shapes for tracing, gradients.

Each of the two ops is the other's gradient. `group` is how many channels a group has.
"""

import torch
from torch import Tensor

from ..backend import call_backend
from ..library import differentiable, mutating_op
from ..routing import snapshot


@torch.library.custom_op("tossup::repeat_groups", mutates_args=())
def repeat_groups_op(
    x: Tensor, group: int, repeats: int, count: Tensor | None, samples: Tensor | None, impl: str
) -> Tensor:
    out = x.new_empty((*x.shape[:2], x.shape[2] * repeats))
    call_backend(__package__, impl, "repeat", out, x, group, count, samples)
    return out


@repeat_groups_op.register_fake
def _(x, group, repeats, *others):
    return x.new_empty((*x.shape[:2], x.shape[2] * repeats))


@torch.library.custom_op("tossup::sum_groups", mutates_args=())
def sum_groups_op(
    x: Tensor, group: int, repeats: int, count: Tensor | None, samples: Tensor | None, impl: str
) -> Tensor:
    out = x.new_empty((*x.shape[:2], x.shape[2] // repeats))
    call_backend(__package__, impl, "add_up", out, x, group, count, samples)
    return out


@sum_groups_op.register_fake
def _(x, group, repeats, *others):
    return x.new_empty((*x.shape[:2], x.shape[2] // repeats))


@mutating_op("repeat_groups_into", mutates_args=("out",))
def repeat_groups_into_op(
    out: Tensor, x: Tensor, group: int, count: Tensor | None, samples: Tensor | None, impl: str
) -> None:
    """As often as fills `out`, given memory of any strides."""
    call_backend(__package__, impl, "repeat", out, x, group, count, samples)


@mutating_op("sum_groups_into", mutates_args=("out",))
def sum_groups_into_op(
    out: Tensor, x: Tensor, group: int, count: Tensor | None, samples: Tensor | None, impl: str
) -> None:
    """The sum of as many copies as x has of `out`, given memory of any strides."""
    call_backend(__package__, impl, "add_up", out, x, group, count, samples)


def save_for_backward(ctx, inputs, output):
    _, group, repeats, count, samples, impl = inputs
    ctx.save_for_backward(*snapshot(count, samples))
    ctx.options = group, repeats, impl


def repeat_groups_gradient(ctx, dout):
    group, repeats, impl = ctx.options
    return add_up(dout, group, repeats, *ctx.saved_tensors, impl), *(None,) * 5


def sum_groups_gradient(ctx, dout):
    group, repeats, impl = ctx.options
    return apply(dout, group, repeats, *ctx.saved_tensors, impl), *(None,) * 5


apply = differentiable(repeat_groups_op, save_for_backward, repeat_groups_gradient, twice=True)
add_up = differentiable(sum_groups_op, save_for_backward, sum_groups_gradient, twice=True)
