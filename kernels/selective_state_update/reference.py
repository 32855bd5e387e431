"""One step of the textbook scan."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import wide


def selective_state_update_reference(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """The output and the new state, in x's and the state's dtypes. Knows no routes.

    Arithmetic in float32, or in float64 where x is float64, which makes an oracle.
    """
    real = wide(x.dtype)
    dim = x.shape[1]
    token = x.to(real)
    step = dt.to(real) if dt_bias is None else dt.to(real) + dt_bias.to(real)
    if dt_softplus:
        step = F.softplus(step)
    B, C = (t.to(real).repeat_interleave(dim // t.shape[1], 1) for t in (B, C))
    decay = torch.exp(step.unsqueeze(-1) * A.to(real))
    after = decay * state.to(real) + (step * token).unsqueeze(-1) * B
    out = (after * C).sum(-1)
    if D is not None:
        out = out + D.to(real) * token
    if z is not None:
        out = out * F.silu(z.to(real))
    return out.to(x.dtype), after.to(state.dtype)
