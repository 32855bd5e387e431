"""CPU backend: two multiply-adds on views of the pairs, for the active samples only."""

import torch
from torch import Tensor

from ..routing import rows_of


def forward(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    count: Tensor | None,
    samples: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """out may be x itself."""
    in_place = out is not None
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if count is None and not in_place:
        turn(x, cos, sin, interleaved, out)
        return out
    rows = rows_of(count, samples)
    chosen = x[rows]
    if cos.ndim == 3:
        cos, sin = cos[rows], sin[rows]
    turned = torch.empty_like(chosen)
    turn(chosen, cos, sin, interleaved, turned)
    out[rows] = turned
    return out


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, out: Tensor) -> None:
    """Write the rotation of x into out."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for all heads
    (a, b), (out_a, out_b) = pairs(x, half, interleaved), pairs(out, half, interleaved)
    out_a.copy_(torch.addcmul(a * cos, b, sin, value=-1))
    out_b.copy_(torch.addcmul(b * cos, a, sin))
    out[..., 2 * half :] = x[..., 2 * half :]


def pairs(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second channels of all pairs, as views."""
    if interleaved:
        return x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]
