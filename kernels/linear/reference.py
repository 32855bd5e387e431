"""The textbook products. Differentiable by autograd; float64 stays float64."""

import torch
from torch import Tensor

from ..precision import wide
from ..routing import Route, put, take


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, route: Route | None) -> Tensor:
    rows = products(take(route, x), weight, bias).to(x.dtype)
    return put(route, rows, len(x))


def products(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias in the accumulator's dtype, of weights rounded to x's."""
    real = wide(x.dtype)
    out = torch.einsum("btk,nk->btn", x.to(real), weight.to(x.dtype).to(real))
    return out if bias is None else out + bias.to(x.dtype).to(real)


def gradients(dout: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of weight and bias, in the accumulator's dtype."""
    real = wide(x.dtype)
    dout, x = dout.to(real), x.to(real)
    return torch.einsum("btn,btk->nk", dout, x), dout.sum((0, 1))
