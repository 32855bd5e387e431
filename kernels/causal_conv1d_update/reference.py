"""Tokens one by one: each meets what the state holds, and then shifts it or enters the ring."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import wide


def causal_conv1d_update_reference(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    entries: Tensor,
) -> Tensor:
    """The output of x (batch, seqlen, dim), token by token; overwrites conv_state.

    entries: (batch,), the sample's place in conv_state. Knows no routes. Arithmetic in float32, or
    in float64 where x is float64, which makes an oracle.
    """
    real = wide(x.dtype)
    state_len, past = conv_state.shape[1], weight.shape[1] - 1
    out = torch.zeros_like(x)
    for row, entry in enumerate(entries.tolist()):
        if entry < 0:
            continue
        state = conv_state[entry]
        for t, token in enumerate(x[row]):
            if cache_seqlens is None:
                before = state[state_len - past :]
            else:
                place = int(cache_seqlens[row]) + t
                before = state[[(place - past + k) % state_len for k in range(past)]]
            y = (torch.cat([before, token[None].to(state.dtype)]).to(real) * weight.to(real).T).sum(
                0
            )
            if bias is not None:
                y = y + bias.to(real)
            out[row, t] = F.silu(y) if activation == "silu" else y
            if cache_seqlens is None:
                state.copy_(torch.cat([state[1:], token[None].to(state.dtype)]))
            else:
                state[place % state_len] = token
    return out
