"""States across the segments of a length that several programs share out."""

import triton.language as tl

from ..exponentials import in_base_2, silu
from ..routing.gate import active_sample, routed_jit
from .tiles import (
    at,
    beside_states,
    channels_of,
    continuing,
    load_edge,
    load_operands,
    load_plane,
    load_turn,
    load_weights,
    operand_of,
    rows_of,
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
    x is then dout, and the operand C in place of B. z: only with REVERSE.
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
    operand = operand_of(
        operand_ptr, stride_operand, groups, sample, tile, channels, dim, run, held, RUNS, CONSTANT
    )
    # [BLOCK_DIM]
    bias = load_weights(bias_ptr, stride_bias, channels)
    steps = tl.zeros([BLOCK_DIM], tl.float32)
    rows = (
        rows_of(x_ptr, stride_x, sample, channels),
        rows_of(delta_ptr, stride_delta, sample, channels),
    )
    pitches = stride_x[1], stride_delta[1]
    if z_ptr is not None:
        rows += (rows_of(z_ptr, stride_z, sample, channels),)
        pitches += (stride_z[1],)

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
    FIRST: tl.constexpr = TOKENS - 1 if REVERSE else 0
    STEP: tl.constexpr = -1 if REVERSE else 1
    done = start * 0
    while done < length:
        first = start + done
        if REVERSE:
            first = end - done - TOKENS
        turn = load_turn(rows, pitches, first, last, TOKENS, False)
        xs, deltas = turn[0], turn[1]
        operands = load_operands(
            operand, first, last, stride_operand, STATE, STATES, RUNS, CONSTANT, TOKENS, False
        )
        same = continuing(seq_idx_ptr, stride_seq, sample, first, last, TOKENS)
        for j in tl.static_range(FIRST, FIRST + TOKENS * STEP, STEP):
            there = at(inside, first + j, seqlen, False)
            step, _ = step_of(deltas[j], bias, there, SOFTPLUS)
            steps += step
            x = xs[j].to(tl.float32)
            factor = beside_states(operands[j])
            decay = tl.exp2(step[None, :] * A)
            if z_ptr is not None:
                x *= silu(turn[2][j].to(tl.float32))
            x = tl.where(there, x, 0.0)
            if REVERSE:
                h = decay * (h + x[None, :] * factor)
            if seq_idx_ptr is not None:
                h = tl.where(same[j], h, 0.0)
                broken = tl.where(same[j], broken, 1)
            if not REVERSE:
                h = decay * h + (step * x)[None, :] * factor
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
    h = load_edge(edge_ptr, stride_edge, sample, 0, columns, held)
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
            # Of no state nothing is left, by whatever it would grow
            grown = tl.where(h == 0, 0.0, tl.exp2(steps[None, :] * A) * h)
            h = tl.where(broken != 0, added, grown + added)
        else:
            store_plane(ptr, h, dim, columns, held)
        done += 1
