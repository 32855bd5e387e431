"""The forward pass: a sweep through the tokens."""

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
    load_turn,
    operand_ptrs,
    step_of,
    store_plane,
    token_of,
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
    h = tl.zeros([STATES, BLOCK_DIM], tl.float32)
    if state_ptr is not None:
        before = state_ptr + sample * stride_h[0] + tl.program_id(2) * stride_h[1]
        before += n[:, None] * stride_h[2] + columns[None, :] * stride_h[3]
        h = tl.load(before, mask=held, other=0.0).to(tl.float32)
    if CONSTANT_B:
        b = load_plane(B_ptr, dim, columns, held)
    else:
        b_ptrs = operand_ptrs(
            B_ptr, stride_b, groups_b, sample, channels, tile, dim, run, BLOCK_DIM, RUNS
        )
    if CONSTANT_C:
        c = load_plane(C_ptr, dim, columns, held)
    else:
        c_ptrs = operand_ptrs(
            C_ptr, stride_c, groups_c, sample, channels, tile, dim, run, BLOCK_DIM, RUNS
        )
    # [BLOCK_DIM]
    bias = None
    if D_ptr is not None:
        D = tl.load(D_ptr + channels * stride_d).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channels * stride_bias).to(tl.float32)
    last = seqlen - 1
    start = tl.program_id(2).to(tl.int64) * segment
    stop = tl.minimum(start + segment, seqlen)
    u_ptrs = u_ptr + sample * stride_u[0] + channels * stride_u[2]
    delta_ptrs = delta_ptr + sample * stride_delta[0] + channels * stride_delta[2]
    streams, pitches = (u_ptrs, delta_ptrs), (stride_u[1], stride_delta[1])
    if z_ptr is not None:
        streams += (z_ptr + sample * stride_z[0] + channels * stride_z[2],)
        pitches += (stride_z[1],)
    out_ptrs = out_ptr + sample * stride_out + columns
    kept_ptr += sample * stride_kept

    turn = load_turn(streams, pitches, start, last, TOKENS, EVEN)
    while start < stop:
        kept = kept_ptr + start // CHUNK * STATE * dim
        store_plane(kept, h, dim, columns, held)
        first = start
        while first < tl.minimum(start + CHUNK, stop):
            bs, cs, same, outs = (), (), (), ()
            for j in tl.static_range(TOKENS):
                t = token_of(first, j, last, EVEN)
                if not CONSTANT_B:
                    bs += (load_operand(b_ptrs, t, stride_b, STATE, STATES, RUNS),)
                if not CONSTANT_C:
                    cs += (load_operand(c_ptrs, t, stride_c, STATE, STATES, RUNS),)
                if seq_idx_ptr is not None:
                    same += (continues(seq_idx_ptr, stride_seq, sample, first + j, last),)
            # What no other program has brought near is loaded a turn early
            after = tl.where(first + TOKENS < seqlen, first + TOKENS, first)
            ahead = load_turn(streams, pitches, after, last, TOKENS, EVEN)
            for j in tl.static_range(TOKENS):
                there = at(inside, first + j, seqlen, EVEN)
                u = turn[j].to(tl.float32)
                step, _ = step_of(turn[TOKENS + j], bias, there, SOFTPLUS)
                drive = tl.where(there, step * u, 0.0)
                if not CONSTANT_B:
                    b = beside_states(bs[j])
                if not CONSTANT_C:
                    c = beside_states(cs[j])
                if seq_idx_ptr is not None:
                    h = tl.where(same[j], h, 0.0)
                h = tl.exp2(step[None, :] * A) * h + drive[None, :] * b
                y = tl.sum(h * c, 0)
                if D_ptr is not None:
                    y += D * u
                if z_ptr is not None:
                    z = turn[2 * TOKENS + j].to(tl.float32)
                    y *= silu(z)
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
