"""Linear layers of the route's samples: y = x Wᵀ + bias, and its two gradients.

The data gradient dx = dy W is the same product, with the transposed weight; the weight gradient is
dW = Σ dyᵀ x over the tokens of the active samples.
"""

import torch
from torch import Tensor

from ..backend import Impl, resolve_for
from ..checks import check_floating, check_shapes, check_written
from ..precision import autocast
from ..routing import Route, rows_of, take, tensors_of
from .reference import gradients, linear_reference, products

__all__ = ["linear", "linear_into", "weight_gradient_into"]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    route: Route | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """x Wᵀ + bias.

    x: (batch, seqlen, in_features), float16, bfloat16, float32 or float64; any strides. Under
        torch.autocast it is taken in that dtype, as by torch's own.
    weight: (out_features, in_features), any strides. bias: (out_features,), None is zero. Both may
        differ in dtype from x, and are then rounded to x's, as autocast does, on the way.
    route: the samples to work on. The rows of others are left unwritten in the result and in x's
        gradient, and add nothing to the gradients of weight and bias, which are zeros where no
        sample is active. None is all. The backward follows the route as it was in forward.
    Returns a contiguous (batch, seqlen, out_features) in x's dtype, accumulated in float32, or in
    float64 where x is float64. Differentiable in x, weight and bias, whose gradients have their
    dtypes. Deterministic.
    Raises ValueError where a shape or a dtype is not as above.
    """
    (x,) = autocast(x)
    check(x, weight, bias)
    routed = tensors_of(route, x.shape[0])
    chosen = resolve_for(impl, x, weight, bias, *routed)
    if chosen == "reference":
        return linear_reference(x, weight, bias, route)
    from .ops import apply

    return apply(x, weight, bias, *routed, chosen)


def linear_into(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    accumulate: bool = False,
    route: Route | None = None,
    impl: Impl = "auto",
) -> None:
    """`linear`, into memory that is there. Without gradients.

    out: (batch, seqlen, out_features), any floating dtype and any strides without overlap. The rows
        of samples that are not active are left as they are.
    accumulate: add to what out holds, in float32 or x's wider dtype; the sum is rounded once.
    The other arguments are those of `linear`. With weight.t(), this is the data gradient.
    Raises ValueError where a shape or a dtype is not as above.
    """
    check(x, weight, bias)
    check_shapes(out=(out, (*x.shape[:2], len(weight))))
    check_floating(out=out)
    routed = tensors_of(route, x.shape[0])
    chosen = resolve_for(impl, out, x, weight, bias, *routed)
    with torch.no_grad():
        if chosen == "reference":
            rows = rows_of(*routed)
            values = products(take(route, x), weight, bias)
            out[rows] = (values + out[rows] if accumulate else values).to(out.dtype)
            return
        from .ops import linear_into_op

        linear_into_op(out, x, weight, bias, accumulate, *routed, chosen)


def weight_gradient_into(
    grad: Tensor,
    dout: Tensor,
    x: Tensor,
    *,
    bias_grad: Tensor | None = None,
    written: Tensor | None = None,
    route: Route | None = None,
    impl: Impl = "auto",
) -> None:
    """grad[n, k] = Σ dout[b, t, n] x[b, t, k], over the active samples b and all tokens t.

    grad: (out_features, in_features), any floating dtype and any strides without overlap.
    dout: (batch, seqlen, out_features), and x: (batch, seqlen, in_features), of one floating dtype;
        any strides.
    bias_grad: (out_features,), gets Σ dout[b, t, n]; any floating dtype. None: do not compute it.
    written: int32, shape (), on the device: how often grad and bias_grad were written before. If it
        is above 0, add to what they hold; if it is 0, or None, store. It is not changed.
    route: the samples to work on; None is all. With no active sample, and with no token, grad and
        bias_grad are left as they are, whatever `written` says.
    Sums are in float32, or in float64 where x is float64, and are rounded once, with what is there.
    Without gradients. Deterministic.
    Raises ValueError where a shape or a dtype is not as above.
    """
    check_activations(x=x, dout=dout)
    if dout.shape[:2] != x.shape[:2] or dout.dtype != x.dtype:
        raise ValueError(
            f"dout must be (batch, seqlen, out_features) = ({x.shape[0]}, {x.shape[1]}, …) in x's"
            f" dtype {x.dtype}, got {tuple(dout.shape)} in {dout.dtype}"
        )
    check_shapes(grad=(grad, (dout.shape[2], x.shape[2])), bias_grad=(bias_grad, (dout.shape[2],)))
    check_floating(grad=grad, bias_grad=bias_grad)
    check_written(written)
    tensors, routed = (grad, dout, x, bias_grad, written), tensors_of(route, x.shape[0])
    chosen = resolve_for(impl, *tensors, *routed)
    with torch.no_grad():
        if chosen != "reference":
            from .ops import linear_weight_gradient_into_op

            linear_weight_gradient_into_op(*tensors, *routed, chosen)
            return
        dout, x = take(route, dout), take(route, x)
        if x.shape[0] * x.shape[1] == 0:
            return
        add = written is not None and int(written) > 0
        for target, value in zip((grad, bias_grad), gradients(dout, x), strict=True):
            if target is not None:
                target.copy_(target + value if add else value)


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_activations(x=x)
    if weight.ndim != 2 or weight.shape[1] != x.shape[2] or not weight.is_floating_point():
        raise ValueError(
            f"weight must be floating, (out_features, in_features) = (…, {x.shape[2]}),"
            f" got {weight.dtype} {tuple(weight.shape)}"
        )
    check_shapes(bias=(bias, (len(weight),)))
    check_floating(bias=bias)


def check_activations(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim != 3 or tensor.shape[2] == 0 or not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be floating, (batch, seqlen, features) with at least one feature,"
                f" got {tensor.dtype} {tuple(tensor.shape)}"
            )
