"""CPU backend: the new tokens behind the state's, and a multiply-add for each tap.

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
    first = None if cache_seqlens is None else cache_seqlens[rows].long()[:, None]
    if conv_state_indices is None:
        out, conv_state[rows] = convolve(x[rows], conv_state[rows], weight, bias, activation, first)
        return place(rows, out, len(x), x.dtype)
    entries = conv_state_indices[rows].long()
    valid = entries >= 0
    state = conv_state[entries.clamp(min=0)]
    out, after = convolve(x[rows], state, weight, bias, activation, first)
    conv_state[entries[valid]] = after[valid]
    return place(rows, out.masked_fill(~valid[:, None, None], 0.0), len(x), x.dtype)


def convolve(x, state, weight, bias, activation, first):
    """The output, and the state (batch, state_len, dim) afterwards.

    first: (batch, 1), the place of each sample's first token in the ring, which is overwritten, or
        None.
    """
    seqlen, state_len, past = x.shape[1], state.shape[1], weight.shape[1] - 1
    tokens = x.to(state.dtype)
    if first is None:
        before = state[:, state_len - past :]
        after = torch.cat((state, tokens), 1)[:, seqlen:]
    else:
        batch = torch.arange(len(first))[:, None]
        before = state[batch, (first + torch.arange(-past, 0)) % state_len]
        state[batch, (first + torch.arange(seqlen)) % state_len] = tokens
        after = state

    real = wide(x.dtype)
    inputs, taps = torch.cat((before, tokens), 1).to(real), weight.to(real).unbind(1)
    out = inputs[:, past:] * taps[past]
    for k in range(past):
        out.addcmul_(inputs[:, k : k + seqlen], taps[k])
    if bias is not None:
        out += bias.to(real)
    return F.silu(out) if activation == "silu" else out, after
