"""CPU backend: a compiled serial sweep in time, in parallel over samples and blocks of channels.

The lanes of the vector unit lie along channels, and a block's state stays in the first-level cache.
The forward pass keeps the state of every CHUNK-th token. The backward pass takes chunks from last
to first, replays each from its kept state, and sweeps it in reverse; the recurrence is never
inverted. The sweeps' own sums have one order, whatever the number of threads; where torch divides
what is around them among its threads (from 32768 numbers on), rounding depends on their number.

Floor: arithmetic. For each channel, token and state the forward pass needs one exponential, 12
vector instructions, and 4 more; the backward pass has those again, 9 more, and two sums over the
lanes. What torch does around the sweep (softplus, gate, skip) is a few passes over u's size. Where
every channel has a B or C of its own, it also has a block of its own, and one lane of it works.
"""

import math
from pathlib import Path

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import wide
from ..routing import place, rows_of
from ..sweeps import exp, sweep
from .lanes import LANES, load, multiply, multiply_add, splat, store, total
from .ops import CHUNKS

CHUNK = CHUNKS["cpu"]
ALSO = Path(__file__).with_name("lanes.py").read_bytes() + b"%d" % CHUNK


@numba.njit
def locate(task, dim, run):
    """The sample, first channel and number of channels of a task.

    run: how many consecutive channels share both B and C. No block crosses the end of a run.
    """
    blocks_of_run = (run + LANES - 1) // LANES
    blocks = dim // run * blocks_of_run
    sample, block = task // blocks, task % blocks
    offset = block % blocks_of_run * LANES
    return sample, block, block // blocks_of_run * run + offset, min(LANES, run - offset)


@sweep(also=ALSO)
def forward_sweep(tasks, run, u, delta, A, B, C, resets, state, y, kept):
    """y and the final state, in place of the initial one, of every block in `tasks`."""
    seqlen, dim = u.shape[1:]
    states = A.shape[1]
    decay_rate, h = np.zeros((states, LANES), u.dtype), np.zeros((states, LANES), u.dtype)
    step, drive = np.zeros(LANES, u.dtype), np.zeros(LANES, u.dtype)
    sums = np.zeros(LANES, u.dtype)
    for task in tasks:
        s, _, first, width = locate(task, dim, run)
        b_group, c_group = first * B.shape[2] // dim, first * C.shape[2] // dim
        decay_rate[:] = 0
        h[:] = 0
        step[:] = 0
        drive[:] = 0
        for n in range(states):
            for lane in range(width):
                decay_rate[n, lane] = A[first + lane, n]
                h[n, lane] = state[s, first + lane, n]
        for t in range(seqlen):
            if t % CHUNK == 0:
                for n in range(states):
                    for lane in range(width):
                        kept[s, t // CHUNK, n, first + lane] = h[n, lane]
            if resets[s, t]:
                h[:] = 0
            for lane in range(width):
                step[lane] = delta[s, t, first + lane]
                drive[lane] = delta[s, t, first + lane] * u[s, t, first + lane]
            sums[:] = 0
            for n in range(states):
                b, c = B[s, t, b_group, n], C[s, t, c_group, n]
                for lane in range(LANES):
                    value = exp(step[lane] * decay_rate[n, lane]) * h[n, lane] + drive[lane] * b
                    h[n, lane] = value
                    sums[lane] += value * c
            for lane in range(width):
                y[s, t, first + lane] = sums[lane]
        for n in range(states):
            for lane in range(width):
                state[s, first + lane, n] = h[n, lane]


@sweep(also=ALSO)
def backward_sweep(
    tasks, run, dy, u, delta, A, B, C, resets, kept, dstate, y, du, ddelta, dA, dB, dC
):
    """The gradients of every block in `tasks`, and y again.

    dstate: the final state's gradient, replaced by the initial one's.
    dA: (batch, dim, state), to be summed over samples. dB, dC: (batch, seqlen, blocks, state), to
    be summed over the blocks of a group; added to, as all tokens may share one place.
    """
    seqlen, dim = u.shape[1:]
    states, dtype = A.shape[1], u.dtype
    decay_rate, ddecay_rate = np.zeros((states, LANES), dtype), np.zeros((states, LANES), dtype)
    dh = np.zeros((states, LANES), dtype)
    h, decay = np.zeros((CHUNK + 1, states, LANES), dtype), np.zeros((CHUNK, states, LANES), dtype)
    step, x = np.zeros((CHUNK, LANES), dtype), np.zeros((CHUNK, LANES), dtype)
    drive = np.zeros((CHUNK, LANES), dtype)
    sums, dout = np.zeros(LANES, dtype), np.zeros(LANES, dtype)
    ddrive, dstep = np.zeros(LANES, dtype), np.zeros(LANES, dtype)
    zero = dtype.type(0)
    for task in tasks:
        s, block, first, width = locate(task, dim, run)
        b_group, c_group = first * B.shape[2] // dim, first * C.shape[2] // dim
        decay_rate[:] = 0
        ddecay_rate[:] = 0
        dh[:] = 0
        h[:] = 0
        step[:] = 0
        x[:] = 0
        drive[:] = 0
        dout[:] = 0
        for n in range(states):
            for lane in range(width):
                decay_rate[n, lane] = A[first + lane, n]
                dh[n, lane] = dstate[s, first + lane, n]
        for chunk in range(kept.shape[1] - 1, -1, -1):
            start = chunk * CHUNK
            length = min(CHUNK, seqlen - start)
            for n in range(states):
                for lane in range(width):
                    h[0, n, lane] = kept[s, chunk, n, first + lane]
            for i in range(length):
                t = start + i
                for lane in range(width):
                    step[i, lane] = delta[s, t, first + lane]
                    x[i, lane] = u[s, t, first + lane]
                    drive[i, lane] = delta[s, t, first + lane] * u[s, t, first + lane]
                sums[:] = 0
                reset = resets[s, t]  # what overflowed before it is left out, as 0 · ∞ is not 0
                for n in range(states):
                    b, c = B[s, t, b_group, n], C[s, t, c_group, n]
                    for lane in range(LANES):
                        a = zero if reset else exp(step[i, lane] * decay_rate[n, lane])
                        carried = zero if reset else a * h[i, n, lane]
                        value = carried + drive[i, lane] * b
                        decay[i, n, lane] = a
                        h[i + 1, n, lane] = value
                        sums[lane] += value * c
                for lane in range(width):
                    y[s, t, first + lane] = sums[lane]
            for i in range(length - 1, -1, -1):
                t = start + i
                for lane in range(width):
                    dout[lane] = dy[s, t, first + lane]
                dout_t, drive_t, step_t = load(dout, 0), load(drive, i), load(step, i)
                ddrive_t, dstep_t = splat(zero), splat(zero)
                for n in range(states):
                    dh_n = multiply_add(dout_t, splat(C[s, t, c_group, n]), load(dh, n))
                    dC[s, t, block, n] += total(multiply(dout_t, load(h, (i + 1) * states + n)))
                    dB[s, t, block, n] += total(multiply(dh_n, drive_t))
                    ddrive_t = multiply_add(dh_n, splat(B[s, t, b_group, n]), ddrive_t)
                    dh_n = multiply(dh_n, load(decay, i * states + n))
                    store(dh, n, dh_n)
                    if not resets[s, t]:
                        dexponent = multiply(dh_n, load(h, i * states + n))
                        dstep_t = multiply_add(dexponent, load(decay_rate, n), dstep_t)
                        ddecay_n = multiply_add(dexponent, step_t, load(ddecay_rate, n))
                        store(ddecay_rate, n, ddecay_n)
                store(ddrive, 0, ddrive_t)
                store(dstep, 0, dstep_t)
                for lane in range(width):
                    du[s, t, first + lane] = ddrive[lane] * step[i, lane]
                    ddelta[s, t, first + lane] = dstep[lane] + ddrive[lane] * x[i, lane]
        for n in range(states):
            for lane in range(width):
                dA[s, first + lane, n] = ddecay_rate[n, lane]
                dstate[s, first + lane, n] = dh[n, lane]


def operands(u, delta, A, B, C, delta_bias, seq_idx, rows, delta_softplus):
    """What both sweeps read, for the active samples and in the dtype of the arithmetic."""
    u, delta, A = (x.to(wide(u.dtype)) for x in (u[rows], delta[rows], A))
    B, C = (
        x.to(u.dtype).expand(*u.shape[:2], -1, -1) if x.ndim == 2 else x[rows].to(u.dtype)
        for x in (B, C)
    )
    if delta_bias is not None:
        delta = delta + delta_bias.to(delta.dtype)
    if delta_softplus:
        delta = F.softplus(delta)
    resets = torch.zeros(u.shape[:2], dtype=torch.bool)
    if seq_idx is not None:
        resets[:, 1:] = seq_idx[rows].diff(dim=1) != 0
    return u, delta, A, B, C, resets


def partition(dim: int, B: Tensor, C: Tensor) -> tuple[int, int]:
    """The number of consecutive channels that share both B and C, and the blocks of a sample."""
    run = math.gcd(dim // B.shape[2], dim // C.shape[2])
    return run, dim // run * math.ceil(run / LANES)


def forward(
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, count, samples, delta_softplus,
    into=(None, None),
):  # fmt: skip
    """into: memory for out and kept, or None for each."""
    rows = rows_of(count, samples)
    x, step, rate, b, c, resets = operands(
        u, delta, A, B, C, delta_bias, seq_idx, rows, delta_softplus
    )
    batch, seqlen, dim = x.shape
    run, blocks = partition(dim, b, c)
    if initial_state is None:
        state = x.new_zeros(batch, *A.shape)
    else:
        state = initial_state[rows].to(x.dtype, copy=True)
    y = x.new_empty(x.shape)
    kept = x.new_empty(batch, math.ceil(seqlen / CHUNK), A.shape[1], dim)
    forward_sweep(batch * blocks, run, x, step, rate, b, c, resets, state, y, kept)

    if D is not None:
        y.addcmul_(x, D.to(x.dtype))
    if z is not None:
        y *= F.silu(z[rows].to(x.dtype))
    return (
        place(rows, y, len(u), u.dtype, into=into[0]),
        place(rows, state, len(u), x.dtype),
        place(rows, kept, len(u), x.dtype, into=into[1]),
    )


def backward(
    dout, dfinal_state, kept,
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, count, samples, delta_softplus,
    into=(None, None, None),
):  # fmt: skip
    """into: memory for dB, dC and dz, or None for each."""
    rows = rows_of(count, samples)
    x, step, rate, b, c, resets = operands(
        u, delta, A, B, C, delta_bias, seq_idx, rows, delta_softplus
    )
    batch, seqlen, dim = x.shape
    run, blocks = partition(dim, b, c)
    dy = dout[rows].to(x.dtype)
    if z is not None:
        gate, gated = z[rows].to(x.dtype), dy
        dy = gated * F.silu(gate)
    if dfinal_state is None:
        dstate = x.new_zeros(batch, *A.shape)
    else:
        dstate = dfinal_state[rows].to(x.dtype, copy=True)
    y, du, ddelta = (x.new_empty(x.shape) for _ in range(3))
    dA = x.new_empty(batch, *A.shape)
    dB, dC = (x.new_zeros(batch, 1 if w.ndim == 2 else seqlen, blocks, A.shape[1]) for w in (B, C))
    backward_sweep(
        batch * blocks, run,
        dy, x, step, rate, b, c, resets, kept[rows].contiguous(), dstate, y, du, ddelta, dA,
        *(w.expand(-1, seqlen, -1, -1) for w in (dB, dC)),
    )  # fmt: skip
    dB, dC = (
        dw.sum((0, 1)).to(w.dtype)
        if w.ndim == 2
        else place(rows, dw.unflatten(2, (w.shape[2], -1)).sum(3), len(u), w.dtype, into=memory)
        for dw, w, memory in ((dB, B, into[0]), (dC, C, into[1]))
    )

    dD = dz = ddelta_bias = dinitial_state = None
    if D is not None:
        y.addcmul_(x, D.to(x.dtype))
        du.addcmul_(dy, D.to(x.dtype))
        dD = (dy * x).sum((0, 1)).to(D.dtype)
    if z is not None:
        of_gate = torch.ops.aten.silu_backward(gated * y, gate)
        dz = place(rows, of_gate, len(u), z.dtype, into=into[2])
    if delta_softplus:  # the derivative is sigmoid(x) = 1 - exp(-softplus(x)), and 1 above 20
        ddelta *= torch.where(step > 20, 1.0, -torch.expm1(-step))
    if delta_bias is not None:
        ddelta_bias = ddelta.sum((0, 1)).to(delta_bias.dtype)
    if initial_state is not None:
        dinitial_state = place(rows, dstate, len(u), initial_state.dtype)
    return (
        place(rows, du, len(u), u.dtype),
        place(rows, ddelta, len(u), delta.dtype),
        dA.sum(0).to(A.dtype),
        dB,
        dC,
        dD,
        dz,
        ddelta_bias,
        dinitial_state,
    )
