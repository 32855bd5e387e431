"""The textbook loop over the tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import wide


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: the output and the state after the last token.

    Arithmetic in float32, or in float64 where u is float64, which makes an oracle. Knows no routes.
    """
    real = wide(u.dtype)
    batch, seqlen, dim = u.shape
    x, A = u.to(real), A.to(real)
    delta = delta.to(real) if delta_bias is None else delta.to(real) + delta_bias.to(real)
    if delta_softplus:
        delta = F.softplus(delta)
    B, C = (  # (batch, seqlen, dim, state)
        w.to(real).expand(batch, seqlen, -1, -1)
        if w.ndim == 2
        else w.to(real).repeat_interleave(dim // w.shape[2], 2)
        for w in (B, C)
    )

    state = x.new_zeros(batch, *A.shape) if initial_state is None else initial_state.to(real)
    outs = []
    for t in range(seqlen):
        if seq_idx is not None and t > 0:
            same = seq_idx[:, t] == seq_idx[:, t - 1]
            state = torch.where(same[:, None, None], state, 0.0)
        decay = torch.exp(delta[:, t, :, None] * A)
        state = decay * state + (delta[:, t] * x[:, t]).unsqueeze(-1) * B[:, t]
        outs.append((state * C[:, t]).sum(-1))

    out = torch.stack(outs, 1)
    if D is not None:
        out = out + D.to(real) * x
    if z is not None:
        out = out * F.silu(z.to(real))
    return out.to(u.dtype), state
