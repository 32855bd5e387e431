"""States across the segments of a length that several programs share out."""

import triton.language as tl

from ..exponentials import in_base_2, silu
from ..routing.gate import active_sample, routed_jit
from .tiles import (
    at,
    beside_states,
    channels_of,
    continues,
    load_operand,
    load_plane,
    operand_ptrs,
    step_of,
    store_plane,
)


@routed_jit("seqlen", "dim", "run", "segment")
def local_kernel(
    x_ptr, delta_ptr, A_ptr, operand_ptr, z_ptr, bias_ptr, seq_idx_ptr, count_ptr, samples_ptr,
    states_ptr, steps_ptr, broken_ptr,
    seqlen, dim, run, segment, groups,
    stride_x, stride_delta, stride_operand, stride_z, stride_bias, stride_seq,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, CONSTANT: tl.constexpr,
    STATE: tl.constexpr, STATES: tl.constexpr, BLOCK_DIM: tl.constexpr, RUNS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """What one segment by itself, from zero, adds to the state after it; and how it decays others.

    REVERSE takes the gradient of the state instead, from the segment's end to what is before it:
    x is then dout, and the operand C in place of B.
    states: (batch, segments, state, dim). steps: (batch, segments, dim), the sum of the step sizes.
    broken: (batch, segments, tiles), whether a packed sequence begins in the segment.
    """
    sample = active_sample(count_ptr, samples_ptr, tl.program_id(1))
    if sample < 0:
        return
    tile = tl.program_id(0)
    columns, inside = channels_of(tile, dim, run, BLOCK_DIM, RUNS, False)
    channels = tl.where(inside, columns, 0)
    n = tl.arange(0, STATES).to(tl.int64)
    held = (n < STATE)[:, None] & inside[None, :]

    # [STATES, BLOCK_DIM]
    A = in_base_2(load_plane(A_ptr, dim, columns, held))
    h = tl.zeros([STATES, BLOCK_DIM], tl.float32)
    if CONSTANT:
        operand = load_plane(operand_ptr, dim, columns, held)
    else:
        ptrs = operand_ptrs(
            operand_ptr, stride_operand, groups, sample, channels, tile, dim, run, BLOCK_DIM, RUNS
        )
    # [BLOCK_DIM]
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channels * stride_bias).to(tl.float32)
    steps = tl.zeros([BLOCK_DIM], tl.float32)
    x_ptrs = x_ptr + sample * stride_x[0] + channels * stride_x[2]
    delta_ptrs = delta_ptr + sample * stride_delta[0] + channels * stride_delta[2]
    if z_ptr is not None:
        z_ptrs = z_ptr + sample * stride_z[0] + channels * stride_z[2]

    # Nothing goes on after the last segment, nor before the first
    part = tl.program_id(2)
    segments = tl.num_programs(2) + 1
    if REVERSE:
        part += 1
    last = seqlen - 1
    start = part.to(tl.int64) * segment
    length = tl.minimum(start + segment, seqlen) - start
    end = start + tl.cdiv(length, TOKENS) * TOKENS
    broken = tile * 0
    done = start * 0
    while done < length:
        xs, deltas, zs, operands, same = (), (), (), (), ()
        for j in tl.static_range(TOKENS):
            token = start + done + j
            if REVERSE:
                token = end - 1 - done - j
            t = tl.minimum(token, last)
            xs += (tl.load(x_ptrs + t * stride_x[1]),)
            deltas += (tl.load(delta_ptrs + t * stride_delta[1]),)
            if not CONSTANT:
                operands += (load_operand(ptrs, t, stride_operand, STATE, STATES, RUNS),)
            if z_ptr is not None:
                zs += (tl.load(z_ptrs + t * stride_z[1]),)
            if seq_idx_ptr is not None:
                same += (continues(seq_idx_ptr, stride_seq, sample, token, last),)
        for j in tl.static_range(TOKENS):
            token = start + done + j
            if REVERSE:
                token = end - 1 - done - j
            there = at(inside, token, seqlen, False)
            step, _ = step_of(deltas[j], bias, there, SOFTPLUS)
            steps += step
            x = xs[j].to(tl.float32)
            if not CONSTANT:
                operand = beside_states(operands[j])
            decay = tl.exp2(step[None, :] * A)
            if REVERSE:
                if z_ptr is not None:
                    z = zs[j].to(tl.float32)
                    x *= silu(z)
            x = tl.where(there, x, 0.0)
            if REVERSE:
                h = decay * (h + x[None, :] * operand)
            if seq_idx_ptr is not None:
                h = tl.where(same[j], h, 0.0)
                broken = tl.where(same[j], broken, 1)
            if not REVERSE:
                h = decay * h + (step * x)[None, :] * operand
        done += TOKENS

    place = sample * segments + part
    store_plane(states_ptr + place * STATE * dim, h, dim, columns, held)
    tl.store(steps_ptr + place * dim + columns, steps, mask=inside)
    tl.store(broken_ptr + place * tl.num_programs(0) + tile, broken)


@routed_jit("dim", "run", "segments")
def carry_kernel(
    edge_ptr, A_ptr, states_ptr, steps_ptr, broken_ptr, count_ptr, samples_ptr,
    dim, run, segments, stride_edge,
    REVERSE: tl.constexpr, STATE: tl.constexpr, STATES: tl.constexpr, BLOCK_DIM: tl.constexpr,
    RUNS: tl.constexpr,
):  # fmt: skip
    """Replaces what each segment adds by the state before it; with REVERSE, by the gradient of the
    state after it.

    edge: the state before the first segment, or the gradient of that after the last. None is zero.
    stride_edge: (batch, segment, state, dim).
    """
    sample = active_sample(count_ptr, samples_ptr, tl.program_id(1))
    if sample < 0:
        return
    tile = tl.program_id(0)
    columns, inside = channels_of(tile, dim, run, BLOCK_DIM, RUNS, False)
    n = tl.arange(0, STATES).to(tl.int64)
    held = (n < STATE)[:, None] & inside[None, :]

    # [STATES, BLOCK_DIM]
    A = in_base_2(load_plane(A_ptr, dim, columns, held))
    h = tl.zeros([STATES, BLOCK_DIM], tl.float32)
    if edge_ptr is not None:
        edge = edge_ptr + sample * stride_edge[0] + n[:, None] * stride_edge[2]
        h = tl.load(edge + columns[None, :] * stride_edge[3], mask=held, other=0.0).to(tl.float32)
    done = tile * 0
    while done < segments:
        part = done
        if REVERSE:
            part = segments - 1 - done
        place = sample * segments + part
        ptr = states_ptr + place * STATE * dim
        if done < segments - 1:
            added = load_plane(ptr, dim, columns, held)
            steps = tl.load(steps_ptr + place * dim + columns, mask=inside, other=0.0)
            broken = tl.load(broken_ptr + place * tl.num_programs(0) + tile)
            store_plane(ptr, h, dim, columns, held)
            h = tl.where(broken != 0, added, tl.exp2(steps[None, :] * A) * h + added)
        else:
            store_plane(ptr, h, dim, columns, held)
        done += 1
