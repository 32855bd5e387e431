"""The backward pass: each chunk is replayed, and then swept in reverse."""

import triton
import triton.language as tl

from ..exponentials import in_base_2, in_base_e, sigmoid, silu
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


@triton.jit
def store_shares(
    ptr, share, sample, t, seqlen, tile, blocks, STATE: tl.constexpr, RUNS: tl.constexpr
):
    """A token's share of dB or dC, [STATES, BLOCK_DIM], summed over the channels of each run.

    ptr: (batch, seqlen, blocks, state), contiguous.
    """
    STATES: tl.constexpr = share.shape[0]
    BLOCK_DIM: tl.constexpr = share.shape[1]
    n = tl.arange(0, STATES)
    token = sample * seqlen + t
    there = n < tl.where(t < seqlen, STATE, 0)
    if RUNS == 1:
        # [STATES]
        offsets = (token * blocks + tile) * STATE + n
        tl.store(ptr + offsets, tl.sum(share, 1), mask=there)
    else:
        # [STATES, RUNS]
        sums = tl.sum(tl.reshape(share, [STATES, RUNS, BLOCK_DIM // RUNS]), 2)
        block = tile * RUNS + tl.arange(0, RUNS)
        offsets = (token * blocks + block[None, :]) * STATE + n[:, None]
        tl.store(ptr + offsets, sums, mask=there[:, None] & (block < blocks)[None, :])


@routed_jit("seqlen", "dim", "run", "segment", "stride_dh")
def backward_kernel(
    dout_ptr, dstate_ptr, kept_ptr, scratch_ptr,
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, seq_idx_ptr,
    count_ptr, samples_ptr,
    du_ptr, ddelta_ptr, dB_ptr, dC_ptr, dz_ptr, dinitial_ptr, shares_ptr,
    seqlen, dim, run, segment, blocks, groups_b, groups_c,
    stride_dout, stride_dh, stride_u, stride_delta, stride_b, stride_c, stride_d, stride_z,
    stride_bias, stride_seq, stride_dz, stride_kept,
    SOFTPLUS: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
    STATE: tl.constexpr, STATES: tl.constexpr, BLOCK_DIM: tl.constexpr, RUNS: tl.constexpr,
    CHUNK: tl.constexpr, TOKENS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of channels of one active sample, in one segment of its tokens.

    dB, dC: (batch, seqlen, blocks, state), float32, shares to be summed over the blocks of a group.
    shares: (places, segments, ROWS, dim), float32: of dA, of dD and ddelta_bias, and of dB and dC
    where these are constant.
    stride_dh: of the gradient of the state after a segment, (batch, segment, state, dim).
    scratch: (programs, CHUNK / TOKENS, STATES, BLOCK_DIM), float32. EVEN: see `channels_of`.
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
    B = operand_of(
        B_ptr, stride_b, groups_b, sample, tile, channels, dim, run, held, RUNS, CONSTANT_B
    )
    C = operand_of(
        C_ptr, stride_c, groups_c, sample, tile, channels, dim, run, held, RUNS, CONSTANT_C
    )
    dh = load_edge(dstate_ptr, stride_dh, sample, tl.program_id(2), columns, held)
    dA = tl.zeros([STATES, BLOCK_DIM], tl.float32)
    if CONSTANT_B:
        dB = tl.zeros([STATES, BLOCK_DIM], tl.float32)
    if CONSTANT_C:
        dC = tl.zeros([STATES, BLOCK_DIM], tl.float32)
    # [BLOCK_DIM]
    D = load_weights(D_ptr, stride_d, channels)
    bias = load_weights(bias_ptr, stride_bias, channels)
    dD = tl.zeros([BLOCK_DIM], tl.float32)
    dbias = tl.zeros([BLOCK_DIM], tl.float32)
    rows = (
        rows_of(u_ptr, stride_u, sample, channels),
        rows_of(delta_ptr, stride_delta, sample, channels),
        rows_of(dout_ptr, stride_dout, sample, channels),
    )
    pitches = stride_u[1], stride_delta[1], stride_dout[1]
    if z_ptr is not None:
        rows += (rows_of(z_ptr, stride_z, sample, channels),)
        pitches += (stride_z[1],)
        dz_ptrs = rows_of(dz_ptr, stride_dz, sample, channels)
    written = sample * seqlen * dim + columns
    kept_ptr += sample * stride_kept
    places = tl.num_programs(1)
    program = (tl.program_id(2).to(tl.int64) * places + tl.program_id(1)) * tl.num_programs(0)
    scratch_ptr += (program + tile) * (CHUNK // TOKENS) * STATES * BLOCK_DIM
    by_slot = n[:, None] * BLOCK_DIM + tl.arange(0, BLOCK_DIM)[None, :]

    last = seqlen - 1
    origin = tl.program_id(2).to(tl.int64) * segment
    stop = tl.minimum(origin + segment, seqlen)
    start = (stop - 1) // CHUNK * CHUNK
    while start >= origin:
        # Replay the chunk: each token's state from before it goes to the scratch, dC and dz out
        kept = kept_ptr + start // CHUNK * STATE * dim
        h = load_plane(kept, dim, columns, held)
        chunk_stop = tl.minimum(start + CHUNK, stop)
        first = start
        while first < chunk_stop:
            tl.store(scratch_ptr + (first - start) // TOKENS * STATES * BLOCK_DIM + by_slot, h)
            turn = load_turn(rows, pitches, first, last, TOKENS, EVEN)
            us, deltas, douts = turn[0], turn[1], turn[2]
            bs = load_operands(
                B, first, last, stride_b, STATE, STATES, RUNS, CONSTANT_B, TOKENS, EVEN
            )
            if z_ptr is not None:
                cs = load_operands(
                    C, first, last, stride_c, STATE, STATES, RUNS, CONSTANT_C, TOKENS, EVEN
                )
            same = continuing(seq_idx_ptr, stride_seq, sample, first, last, TOKENS)
            for j in tl.static_range(TOKENS):
                t = first + j
                there = at(inside, t, seqlen, EVEN)
                u = us[j].to(tl.float32)
                step, _ = step_of(deltas[j], bias, there, SOFTPLUS)
                drive = tl.where(there, step * u, 0.0)
                dy = douts[j].to(tl.float32)
                if seq_idx_ptr is not None:
                    h = tl.where(same[j], h, 0.0)
                h = tl.exp2(step[None, :] * A) * h + drive[None, :] * beside_states(bs[j])
                if z_ptr is not None:
                    y = tl.sum(h * beside_states(cs[j]), 0)
                    if D_ptr is not None:
                        y += D * u
                    z = turn[3][j].to(tl.float32)
                    gate = sigmoid(z)
                    dz = dy * y * gate * (1.0 + z * (1.0 - gate))
                    dz = dz.to(dz_ptr.dtype.element_ty)
                    tl.store(dz_ptrs + t * stride_dz[1], dz, mask=there)
                    dy *= z * gate
                dy = tl.where(there, dy, 0.0)  # last, as a lane that is not there has another's z
                share = dy[None, :] * h
                if CONSTANT_C:
                    dC += share
                else:
                    if RUNS > 1:  # a lane that is not there has another's B
                        share = tl.where(there[None, :], share, 0.0)
                    store_shares(dC_ptr, share, sample, t, seqlen, tile, blocks, STATE, RUNS)
            first += TOKENS
        tl.debug_barrier()

        # Sweep it in reverse: dh is the gradient of the state after a token, then before it
        while first > start:
            first -= TOKENS
            h = tl.load(scratch_ptr + (first - start) // TOKENS * STATES * BLOCK_DIM + by_slot)
            turn = load_turn(rows, pitches, first, last, TOKENS, EVEN)
            us, deltas, douts = turn[0], turn[1], turn[2]
            bs = load_operands(
                B, first, last, stride_b, STATE, STATES, RUNS, CONSTANT_B, TOKENS, EVEN
            )
            cs = load_operands(
                C, first, last, stride_c, STATE, STATES, RUNS, CONSTANT_C, TOKENS, EVEN
            )
            same = continuing(seq_idx_ptr, stride_seq, sample, first, last, TOKENS)
            xs, steps, raws, decays, hs = (), (), (), (), ()
            for j in tl.static_range(TOKENS):
                there = at(inside, first + j, seqlen, EVEN)
                u = tl.where(there, us[j].to(tl.float32), 0.0)
                step, raw = step_of(deltas[j], bias, there, SOFTPLUS)
                decay = tl.exp2(step[None, :] * A)
                if seq_idx_ptr is not None:
                    h = tl.where(same[j], h, 0.0)
                xs += (u,)
                steps += (step,)
                raws += (raw,)
                decays += (decay,)
                hs += (h,)
                if j < TOKENS - 1:
                    h = decay * h + (step * u)[None, :] * beside_states(bs[j])
            for j in tl.static_range(TOKENS - 1, -1, -1):
                t = first + j
                there = at(inside, t, seqlen, EVEN)
                u, step = xs[j], steps[j]
                dy = douts[j].to(tl.float32)
                if z_ptr is not None:
                    dy *= silu(turn[3][j].to(tl.float32))
                dy = tl.where(there, dy, 0.0)
                dh += dy[None, :] * beside_states(cs[j])
                ddrive = tl.sum(dh * beside_states(bs[j]), 0)
                share = dh * (step * u)[None, :]
                if CONSTANT_B:
                    dB += share
                else:
                    if RUNS > 1:
                        share = tl.where(there[None, :], share, 0.0)
                    store_shares(dB_ptr, share, sample, t, seqlen, tile, blocks, STATE, RUNS)
                dh *= decays[j]
                if seq_idx_ptr is not None:
                    dh = tl.where(same[j], dh, 0.0)
                dexponent = dh * hs[j]
                dA += dexponent * step[None, :]
                ddelta = in_base_e(tl.sum(dexponent * A, 0)) + ddrive * u
                if SOFTPLUS:
                    ddelta *= sigmoid(raws[j])
                ddelta = tl.where(there, ddelta, 0.0)
                dbias += ddelta
                du = ddrive * step
                if D_ptr is not None:
                    du += D * dy
                    dD += dy * u
                tl.store(du_ptr + written + t * dim, du.to(du_ptr.dtype.element_ty), mask=there)
                tl.store(
                    ddelta_ptr + written + t * dim,
                    ddelta.to(ddelta_ptr.dtype.element_ty), mask=there,
                )  # fmt: skip
        tl.debug_barrier()
        start -= CHUNK

    place = tl.program_id(1).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    shares_ptr += place * ROWS * dim
    store_plane(shares_ptr, dA, dim, columns, held)
    tl.store(shares_ptr + STATE * dim + columns, dD, mask=inside)
    tl.store(shares_ptr + (STATE + 1) * dim + columns, dbias, mask=inside)
    shares_ptr += (STATE + 2) * dim
    if CONSTANT_B:
        store_plane(shares_ptr, dB, dim, columns, held)
        shares_ptr += STATE * dim
    if CONSTANT_C:
        store_plane(shares_ptr, dC, dim, columns, held)
    if dinitial_ptr is not None:
        if origin == 0:
            first = dinitial_ptr + sample * dim * STATE + n[:, None] + columns[None, :] * STATE
            tl.store(first, dh.to(dinitial_ptr.dtype.element_ty), mask=held)


@routed_jit("seqlen")
def group_kernel(
    shares_ptr, out_ptr, count_ptr, samples_ptr, seqlen, groups, blocks, stride_out,
    STATE: tl.constexpr, STATES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """dB or dC of one group and some tokens of one active sample: the sum over the group's blocks.

    shares: (batch, seqlen, groups · blocks, state). stride_out: (batch, seqlen, group, state).
    """
    sample = active_sample(count_ptr, samples_ptr, tl.program_id(1))
    if sample < 0:
        return
    group = tl.program_id(2)
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    n = tl.arange(0, STATES).to(tl.int64)
    row = (sample * seqlen + t[:, None]) * groups + group
    there = (t < seqlen)[:, None] & (n < STATE)[None, :]
    total = tl.zeros([TOKENS, STATES], tl.float32)
    block = tl.program_id(2) * 0
    while block < blocks:
        # [TOKENS, STATES]
        ptrs = shares_ptr + (row * blocks + block) * STATE + n[None, :]
        total += tl.load(ptrs, mask=there, other=0.0)
        block += 1
    out_ptr += sample * stride_out[0] + tl.cast(group, tl.int64) * stride_out[2]
    out_ptrs = out_ptr + t[:, None] * stride_out[1] + n[None, :] * stride_out[3]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=there)
