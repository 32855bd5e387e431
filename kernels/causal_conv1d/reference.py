"""The textbook loop over the tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import wide


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """The convolution, token by token: the output and the last width - 1 inputs.

    Arithmetic in float32, or in float64 where x is float64, which makes an oracle. Knows no routes.
    """
    real = wide(x.dtype)
    batch, seqlen, dim = x.shape
    past = weight.shape[1] - 1
    before = x.new_zeros(batch, past, dim) if initial_state is None else initial_state
    inputs = torch.cat([before.to(real), x.to(real)], 1)
    sequence = torch.zeros(batch, past + seqlen, dtype=torch.int64, device=x.device)
    if seq_idx is not None:
        sequence[:, past + 1 :] = (seq_idx.diff(dim=1) != 0).cumsum(1)

    outs = []
    for t in range(seqlen):
        same = sequence[:, t : t + past + 1] == sequence[:, t + past, None]
        window = torch.where(same.unsqueeze(-1), inputs[:, t : t + past + 1], 0.0)
        outs.append((window * weight.to(real).T).sum(1))
    out = torch.stack(outs, 1)
    if bias is not None:
        out = out + bias.to(real)
    if activation == "silu":
        out = F.silu(out)
    last = sequence[:, seqlen:] == sequence[:, -1:]
    final_state = torch.where(last.unsqueeze(-1), inputs[:, seqlen:], 0.0)
    return out.to(x.dtype), final_state.to(x.dtype)
