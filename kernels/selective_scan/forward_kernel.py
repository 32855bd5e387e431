"""The forward pass: a sweep through the tokens."""

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


@routed_jit("seqlen", "dim", "run", "segment", "stride_h", "stride_kept")
def forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, state_ptr, seq_idx_ptr,
    count_ptr, samples_ptr, out_ptr, final_state_ptr, kept_ptr,
    seqlen, dim, run, segment, groups_b, groups_c,
    stride_u, stride_delta, stride_b, stride_c, stride_d, stride_z, stride_bias, stride_h,
    stride_seq, stride_out, stride_kept,
    SOFTPLUS: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
    STATE: tl.constexpr, STATES: tl.constexpr, BLOCK_DIM: tl.constexpr, RUNS: tl.constexpr,
    CHUNK: tl.constexpr, TOKENS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A tile of channels of one active sample, through one segment of its tokens.

    A: (state, dim), float32, contiguous. final_state (batch, dim, state) is contiguous; out (batch,
    seqlen, dim) and kept (batch, chunks, state, dim) are within a sample.
    stride_h: of the state before a segment, (batch, segment, state, dim). EVEN: see `channels_of`.
    """
    sample = active_sample(count_ptr, samples_ptr, tl.program_id(1))
    if sample < 0:
        return
    tile = tl.program_id(0)
    columns, inside = channels_of(tile, dim, run, BLOCK_DIM, RUNS, EVEN)
    channels = tl.where(inside, columns, 0)
    n = tl.arange(0, STATES).to(tl.int64)
    held = (n < STATE)[:, None] & inside[None, :]

    # [STATES, BLOCK_DIM]
    A = in_base_2(load_plane(A_ptr, dim, columns, held))
    h = load_edge(state_ptr, stride_h, sample, tl.program_id(2), columns, held)
    B = operand_of(
        B_ptr, stride_b, groups_b, sample, tile, channels, dim, run, held, RUNS, CONSTANT_B
    )
    C = operand_of(
        C_ptr, stride_c, groups_c, sample, tile, channels, dim, run, held, RUNS, CONSTANT_C
    )
    # [BLOCK_DIM]
    D = load_weights(D_ptr, stride_d, channels)
    bias = load_weights(bias_ptr, stride_bias, channels)
    last = seqlen - 1
    start = tl.program_id(2).to(tl.int64) * segment
    stop = tl.minimum(start + segment, seqlen)
    rows = (
        rows_of(u_ptr, stride_u, sample, channels),
        rows_of(delta_ptr, stride_delta, sample, channels),
    )
    pitches = stride_u[1], stride_delta[1]
    if z_ptr is not None:
        rows += (rows_of(z_ptr, stride_z, sample, channels),)
        pitches += (stride_z[1],)
    out_ptrs = out_ptr + sample * stride_out + columns
    kept_ptr += sample * stride_kept

    turn = load_turn(rows, pitches, start, last, TOKENS, EVEN)
    while start < stop:
        kept = kept_ptr + start // CHUNK * STATE * dim
        store_plane(kept, h, dim, columns, held)
        first = start
        while first < tl.minimum(start + CHUNK, stop):
            bs = load_operands(
                B, first, last, stride_b, STATE, STATES, RUNS, CONSTANT_B, TOKENS, EVEN
            )
            cs = load_operands(
                C, first, last, stride_c, STATE, STATES, RUNS, CONSTANT_C, TOKENS, EVEN
            )
            same = continuing(seq_idx_ptr, stride_seq, sample, first, last, TOKENS)
            # What no other program has brought near is loaded a turn early
            after = tl.where(first + TOKENS < seqlen, first + TOKENS, first)
            ahead = load_turn(rows, pitches, after, last, TOKENS, EVEN)
            us, deltas = turn[0], turn[1]
            outs = ()
            for j in tl.static_range(TOKENS):
                there = at(inside, first + j, seqlen, EVEN)
                u = us[j].to(tl.float32)
                step, _ = step_of(deltas[j], bias, there, SOFTPLUS)
                drive = tl.where(there, step * u, 0.0)
                if seq_idx_ptr is not None:
                    h = tl.where(same[j], h, 0.0)
                h = tl.exp2(step[None, :] * A) * h + drive[None, :] * beside_states(bs[j])
                y = tl.sum(h * beside_states(cs[j]), 0)
                if D_ptr is not None:
                    y += D * u
                if z_ptr is not None:
                    y *= silu(turn[2][j].to(tl.float32))
                outs += (y.to(out_ptr.dtype.element_ty),)
            for j in tl.static_range(TOKENS):
                t = first + j
                tl.store(out_ptrs + t * dim, outs[j], mask=at(inside, t, seqlen, EVEN))
            turn = ahead
            first += TOKENS
        start += CHUNK

    if stop == seqlen:
        final = final_state_ptr + sample * dim * STATE + n[:, None] + columns[None, :] * STATE
        tl.store(final, h, mask=held)
