"""CPU backend: the window of each token gathered from the state and the new tokens, one product.

Floor: latency. A step of one token touches `width` numbers per channel.
"""

import torch
import torch.nn.functional as F

from ..precision import wide
from ..routing import place, rows_of


def update(
    x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, count, samples
):
    rows = rows_of(count, samples)
    seqlen, state_len = x.shape[1], conv_state.shape[1]
    past = weight.shape[1] - 1
    entries = torch.arange(len(x)) if conv_state_indices is None else conv_state_indices.long()
    entries, tokens = entries[rows], x[rows]
    valid = entries >= 0
    state = conv_state[entries.clamp(min=0)]  # (batch, state_len, dim)
    if cache_seqlens is None:
        before = state[:, state_len - past :]
        after = torch.cat((state, tokens.to(state.dtype)), 1)[:, seqlen:]
    else:
        first = cache_seqlens[rows].long()[:, None]
        batch = torch.arange(len(first))[:, None]
        before = state[batch, (first + torch.arange(-past, 0)) % state_len]
        after = state.clone()
        after[batch, (first + torch.arange(seqlen)) % state_len] = tokens.to(state.dtype)
    conv_state[entries[valid]] = after[valid]

    real = wide(x.dtype)
    inputs = torch.cat((before, tokens.to(state.dtype)), 1).to(real)
    out = torch.einsum("btdw,dw->btd", inputs.unfold(1, past + 1, 1), weight.to(real))
    if bias is not None:
        out = out + bias.to(real)
    if activation == "silu":
        out = F.silu(out)
    return place(rows, out.masked_fill(~valid[:, None, None], 0.0), len(x), x.dtype)
