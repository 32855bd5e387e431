"""CPU backend: torch's elementwise calls, on the active samples only.

Floor: bytes. A step reads and writes the state; here torch makes five passes over it.
"""

import torch
import torch.nn.functional as F

from ..precision import wide
from ..routing import place, rows_of


def update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, count, samples):
    real = wide(x.dtype)
    rows = rows_of(count, samples)
    token, step = x[rows].to(real), dt[rows].to(real)
    if dt_bias is not None:
        step = step + dt_bias.to(real)
    if dt_softplus:
        step = F.softplus(step)

    # (batch, dim, state)
    after = (step.unsqueeze(-1) * A.to(real)).exp_().mul_(state[rows])
    # by group: (batch, groups, channels, state), with B and C the same for all channels
    of_b, of_c = (after.unflatten(1, (t.shape[1], -1)) for t in (B, C))
    arriving = (step * token).unflatten(1, (B.shape[1], -1))
    of_b.addcmul_(arriving.unsqueeze(-1), B[rows].to(real).unsqueeze(2))
    state[rows] = after.to(state.dtype)
    products = torch.bmm(of_c.flatten(0, 1), C[rows].to(real).flatten(0, 1).unsqueeze(-1))
    out = products.view_as(token)

    if D is not None:
        out += D.to(real) * token
    if z is not None:
        out *= F.silu(z[rows].to(real))
    return place(rows, out, len(x), x.dtype)
