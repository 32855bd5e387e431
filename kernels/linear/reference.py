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
    out = torch.einsum("btk,nk->btn", x.to(wide(x.dtype)), rounded(weight, x.dtype))
    return out if bias is None else out + rounded(bias, x.dtype)


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to dtype, but not its gradient; in the accumulator's dtype."""
    real = weight.to(wide(dtype))
    return real + (real.to(dtype) - real).detach()


def gradients(dout: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of weight and bias, in the accumulator's dtype."""
    real = wide(x.dtype)
    dout, x = dout.to(real), x.to(real)
    return torch.einsum("btn,btk->nk", dout, x), dout.sum((0, 1))
