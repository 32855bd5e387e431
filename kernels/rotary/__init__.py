"""Rotary position embedding (Su et al. 2021, "RoFormer", equation 34).

Channels a and b of a pair turn by an angle that grows with the token's position:

    a' = a cos − b sin
    b' = b cos + a sin

The paper pairs neighbours (as GPT-J does: interleaved); GPT-NeoX and Llama pair channel i with
channel i + rotary_dim / 2. The backward is the rotation by the opposite angle.
"""

import torch
from torch import Tensor

from ..backend import Impl, resolve_for
from ..routing import Route, tensors_of
from .reference import rotary_reference

__all__ = ["rotary", "rotary_angles"]


def rotary_angles(
    positions: Tensor, rotary_dim: int, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles position · theta^(−2i / rotary_dim).

    positions: integers of any shape (…,).
    rotary_dim: how many channels turn; even.
    Returns (cos, sin), each float32 (…, rotary_dim / 2), of angles in float64. In float32, in
        which transformers computes them, they are off by up to 0.008 at 131072 tokens, and the
        distance of two tokens would be no longer what counts.
    Raises ValueError where rotary_dim is not even and positive.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and at least 2, got {rotary_dim}")
    exponents = torch.arange(0, rotary_dim, 2, device=positions.device).double() / rotary_dim
    angles = positions.unsqueeze(-1) * theta**-exponents
    return angles.cos().float(), angles.sin().float()


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    route: Route | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Turn the first rotary_dim channels of each head, pair by pair; leave the others as they are.

    x: (batch, seqlen, heads, head_dim), float16, bfloat16, float32 or float64; any strides.
    cos, sin: float32, (seqlen, rotary_dim / 2) or (batch, seqlen, rotary_dim / 2), without
        gradients; from `rotary_angles`.
    interleaved: pair channels 2i and 2i + 1 instead of i and i + rotary_dim / 2.
    route: the samples to work on; the rows of others are left unwritten in the result and in x's
        gradient. None means all.
    Returns a contiguous tensor of x's shape and dtype, computed in float32 or x's wider dtype.
        Deterministic.
    Raises ValueError where shapes or dtypes are not as above.
    """
    check_tensors(x, cos, sin)
    routed = tensors_of(route, x.shape[0])
    impl = resolve_for(impl, x, cos, sin, *routed)
    if impl == "reference":
        return rotary_reference(x, cos, sin, interleaved, route)
    from .ops import apply

    return apply(x, cos, sin, interleaved, *routed, impl)


def check_tensors(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"x must be floating, (batch, seqlen, heads, head_dim), got {x.dtype} {tuple(x.shape)}"
        )
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.dtype != torch.float32 or angles.requires_grad:
            raise ValueError(
                f"{name} must be float32 without gradients,"
                f" got {angles.dtype} and requires_grad={angles.requires_grad}"
            )
    if cos.shape != sin.shape or cos.shape[:-1] not in (x.shape[1:2], x.shape[:2]):
        raise ValueError(
            "cos and sin must both be (seqlen, rotary_dim / 2) or (batch, seqlen, rotary_dim / 2),"
            f" got {tuple(cos.shape)} and {tuple(sin.shape)} for x {tuple(x.shape)}"
        )
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            f"cos must hold at most head_dim / 2 = {x.shape[-1] // 2} angles, got {cos.shape[-1]}"
        )
