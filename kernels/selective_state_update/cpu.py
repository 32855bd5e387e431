"""CPU backend: a compiled loop over the channels of the active samples.

Floor: arithmetic. For each state one exponential, 12 vector instructions, and 4 more; bytes, 8 a
state, come close in float32. What torch does around the loop is a few passes over x's size.
"""

import torch
import torch.nn.functional as F

from ..precision import wide
from ..routing import place, rows_of
from ..sweeps import exp, sweep


@sweep(layout="C", fastmath={"contract", "reassoc"})
def advance(tasks, state, token, step, A, B, C, out):
    """The samples in `tasks`: state in place, and C times it. B, C: (batch, groups, states)."""
    dim, states = A.shape
    of_b, of_c = dim // B.shape[1], dim // C.shape[1]
    for s in tasks:
        for d in range(dim):
            b, c = d // of_b, d // of_c
            arriving = step[s, d] * token[s, d]
            total = arriving * 0
            for n in range(states):
                after = exp(step[s, d] * A[d, n]) * state[s, d, n] + arriving * B[s, b, n]
                state[s, d, n] = after
                total += after * C[s, c, n]
            out[s, d] = total


def update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, count, samples):
    real = wide(x.dtype)
    rows = rows_of(count, samples)
    token, step = x[rows].to(real).contiguous(), dt[rows].to(real)
    if dt_bias is not None:
        step = step + dt_bias.to(real)
    if dt_softplus:
        step = F.softplus(step)

    after = state[rows].to(real).contiguous()
    out = torch.empty_like(token)
    b, c = (t[rows].to(real).contiguous() for t in (B, C))
    advance(len(token), after, token, step.contiguous(), A.to(real).contiguous(), b, c, out)
    if after.data_ptr() != state.data_ptr():  # a copy, of some samples or of another dtype
        state[rows] = after.to(state.dtype)

    if D is not None:
        out += D.to(real) * token
    if z is not None:
        out *= F.silu(z[rows].to(real))
    return place(rows, out, len(x), x.dtype)
