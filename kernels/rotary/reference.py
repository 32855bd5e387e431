"""The equation, pair by pair. Differentiable by autograd; float64 stays float64."""

import torch
from torch import Tensor

from ..routing import Route, put, take


def rotary_reference(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, route: Route | None
) -> Tensor:
    batch, rotary_dim = len(x), 2 * cos.shape[-1]
    if cos.ndim == 3:
        cos, sin = take(route, cos), take(route, sin)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for all heads
    turning, rest = take(route, x).tensor_split([rotary_dim], dim=-1)
    pairs = (-1, 2) if interleaved else (2, -1)
    axis = -1 if interleaved else -2
    a, b = turning.unflatten(-1, pairs).unbind(axis)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), axis).flatten(-2).to(x.dtype)
    return put(route, torch.cat((turned, rest), -1), batch)
