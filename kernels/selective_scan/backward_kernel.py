"""The backward pass: each chunk is replayed, and then swept in reverse."""

import triton
import triton.language as tl

from ..exponentials import in_base_2, in_base_e, sigmoid, silu
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
    token_of,
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
    dA = tl.zeros([STATES, BLOCK_DIM], tl.float32)
    dh = tl.zeros([STATES, BLOCK_DIM], tl.float32)
    if dstate_ptr is not None:
        behind = dstate_ptr + sample * stride_dh[0] + tl.program_id(2) * stride_dh[1]
        behind += n[:, None] * stride_dh[2] + columns[None, :] * stride_dh[3]
        dh = tl.load(behind, mask=held, other=0.0).to(tl.float32)
    if CONSTANT_B:
        b = load_plane(B_ptr, dim, columns, held)
        db = tl.zeros([STATES, BLOCK_DIM], tl.float32)
    else:
        b_ptrs = operand_ptrs(
            B_ptr, stride_b, groups_b, sample, channels, tile, dim, run, BLOCK_DIM, RUNS
        )
    if CONSTANT_C:
        c = load_plane(C_ptr, dim, columns, held)
        dc = tl.zeros([STATES, BLOCK_DIM], tl.float32)
    else:
        c_ptrs = operand_ptrs(
            C_ptr, stride_c, groups_c, sample, channels, tile, dim, run, BLOCK_DIM, RUNS
        )
    # [BLOCK_DIM]
    bias = None
    dbias = tl.zeros([BLOCK_DIM], tl.float32)
    dD = tl.zeros([BLOCK_DIM], tl.float32)
    if D_ptr is not None:
        D = tl.load(D_ptr + channels * stride_d).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channels * stride_bias).to(tl.float32)
    u_ptrs = u_ptr + sample * stride_u[0] + channels * stride_u[2]
    delta_ptrs = delta_ptr + sample * stride_delta[0] + channels * stride_delta[2]
    dout_ptrs = dout_ptr + sample * stride_dout[0] + channels * stride_dout[2]
    if z_ptr is not None:
        z_ptrs = z_ptr + sample * stride_z[0] + channels * stride_z[2]
        dz_ptrs = dz_ptr + sample * stride_dz[0] + channels * stride_dz[2]
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
            us, deltas, douts, zs, bs, cs, same = (), (), (), (), (), (), ()
            for j in tl.static_range(TOKENS):
                t = token_of(first, j, last, EVEN)
                us += (tl.load(u_ptrs + t * stride_u[1]),)
                deltas += (tl.load(delta_ptrs + t * stride_delta[1]),)
                douts += (tl.load(dout_ptrs + t * stride_dout[1]),)
                if not CONSTANT_B:
                    bs += (load_operand(b_ptrs, t, stride_b, STATE, STATES, RUNS),)
                if z_ptr is not None:
                    zs += (tl.load(z_ptrs + t * stride_z[1]),)
                    if not CONSTANT_C:
                        cs += (load_operand(c_ptrs, t, stride_c, STATE, STATES, RUNS),)
                if seq_idx_ptr is not None:
                    same += (continues(seq_idx_ptr, stride_seq, sample, first + j, last),)
            for j in tl.static_range(TOKENS):
                t = first + j
                there = at(inside, t, seqlen, EVEN)
                u = us[j].to(tl.float32)
                step, _ = step_of(deltas[j], bias, there, SOFTPLUS)
                drive = tl.where(there, step * u, 0.0)
                dy = douts[j].to(tl.float32)
                if not CONSTANT_B:
                    b = beside_states(bs[j])
                if seq_idx_ptr is not None:
                    h = tl.where(same[j], h, 0.0)
                h = tl.exp2(step[None, :] * A) * h + drive[None, :] * b
                if z_ptr is not None:
                    if not CONSTANT_C:
                        c = beside_states(cs[j])
                    y = tl.sum(h * c, 0)
                    if D_ptr is not None:
                        y += D * u
                    z = zs[j].to(tl.float32)
                    gate = sigmoid(z)
                    dz = dy * y * gate * (1.0 + z * (1.0 - gate))
                    dz = dz.to(dz_ptr.dtype.element_ty)
                    tl.store(dz_ptrs + t * stride_dz[1], dz, mask=there)
                    dy *= z * gate
                dy = tl.where(there, dy, 0.0)  # last, as a lane that is not there has another's z
                if CONSTANT_C:
                    dc += dy[None, :] * h
                else:
                    share = dy[None, :] * h
                    if RUNS > 1:  # a lane that is not there has another's B
                        share = tl.where(there[None, :], share, 0.0)
                    store_shares(dC_ptr, share, sample, t, seqlen, tile, blocks, STATE, RUNS)
            first += TOKENS
        tl.debug_barrier()

        # Sweep it in reverse: dh is the gradient of the state after a token, then before it
        while first > start:
            first -= TOKENS
            h = tl.load(scratch_ptr + (first - start) // TOKENS * STATES * BLOCK_DIM + by_slot)
            us, deltas, douts, zs, bs, cs, same = (), (), (), (), (), (), ()
            for j in tl.static_range(TOKENS):
                t = token_of(first, j, last, EVEN)
                us += (tl.load(u_ptrs + t * stride_u[1]),)
                deltas += (tl.load(delta_ptrs + t * stride_delta[1]),)
                douts += (tl.load(dout_ptrs + t * stride_dout[1]),)
                if not CONSTANT_B:
                    bs += (load_operand(b_ptrs, t, stride_b, STATE, STATES, RUNS),)
                if not CONSTANT_C:
                    cs += (load_operand(c_ptrs, t, stride_c, STATE, STATES, RUNS),)
                if z_ptr is not None:
                    zs += (tl.load(z_ptrs + t * stride_z[1]),)
                if seq_idx_ptr is not None:
                    same += (continues(seq_idx_ptr, stride_seq, sample, first + j, last),)
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
                    if not CONSTANT_B:
                        b = beside_states(bs[j])
                    h = decay * h + (step * u)[None, :] * b
            for j in tl.static_range(TOKENS - 1, -1, -1):
                t = first + j
                there = at(inside, t, seqlen, EVEN)
                u, step = xs[j], steps[j]
                dy = douts[j].to(tl.float32)
                if not CONSTANT_B:
                    b = beside_states(bs[j])
                if not CONSTANT_C:
                    c = beside_states(cs[j])
                if z_ptr is not None:
                    z = zs[j].to(tl.float32)
                    dy *= silu(z)
                dy = tl.where(there, dy, 0.0)
                dh += dy[None, :] * c
                ddrive = tl.sum(dh * b, 0)
                if CONSTANT_B:
                    db += dh * (step * u)[None, :]
                else:
                    share = dh * (step * u)[None, :]
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
        store_plane(shares_ptr, db, dim, columns, held)
        shares_ptr += STATE * dim
    if CONSTANT_C:
        store_plane(shares_ptr, dc, dim, columns, held)
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
