"""CPU backend: the reference's few calls of torch, on the active samples only.

Floor: bytes. A step reads and writes the state; torch makes some six passes over it.
"""

from ..routing import place, rows_of
from .reference import selective_state_update_reference


def update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, count, samples):
    rows = rows_of(count, samples)
    gate = None if z is None else z[rows]
    out, state[rows] = selective_state_update_reference(
        state[rows], x[rows], dt[rows], A, B[rows], C[rows], D, gate, dt_bias, dt_softplus
    )
    return place(rows, out, len(x), x.dtype)
