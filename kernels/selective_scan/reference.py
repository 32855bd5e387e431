import torch
import torch.nn.functional as F
from torch import Tensor


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
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, seqlen, dim = u.shape
    x, A = u.to(wide), A.to(wide)
    delta = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias.to(wide)
    if delta_softplus:
        delta = F.softplus(delta)
    B = B.to(wide).repeat_interleave(dim // B.shape[2], 2)  # (batch, seqlen, dim, state)
    C = C.to(wide).repeat_interleave(dim // C.shape[2], 2)

    state = x.new_zeros(batch, *A.shape) if initial_state is None else initial_state.to(wide)
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
        out = out + D.to(wide) * x
    if z is not None:
        out = out * F.silu(z.to(wide))
    return out.to(u.dtype), state
