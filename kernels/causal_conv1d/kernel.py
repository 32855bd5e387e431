"""Triton kernels and launchers: a program takes a tile of tokens and channels.

A tap is the same tile, loaded some tokens earlier: all but the first load hit the L1 cache. The
backward pass loads the tokens on either side, rebuilds what went into the activation, and sums the
gradients of its tile's taps, which are then added up over the tiles in one order.

Floor: bytes. The forward pass reads x and writes the output, 4 bytes per element in 16 bits; the
backward pass reads x and dout and writes dx, 6 bytes. The arithmetic of 4 taps and SiLU is about 20
instructions and 2 MUFU per element forward, 60 and 8 backward: at 4.8 TB/s an SM of an H200 gets
some 20 bytes per cycle, for which it has 5 elements · 20 / 128 = 0.8 cycles of instructions
forward. How near the kernels come: not measured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..exponentials import sigmoid, silu
from ..launch import cdiv, refuse_more_samples_than_programs, strides
from ..precision import refuse_float64
from ..routing.gate import active_sample, routed_jit


@triton.jit
def inputs_at(
    x_ptr, state_ptr, stride_x, stride_state, sample, t, channels, inside, seqlen,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Tokens t of the input, [BLOCK_T, BLOCK_DIM] in float32: before token 0, the initial state's.

    stride_x, stride_state: (batch, token, channel).
    """
    there = ((t >= 0) & (t < seqlen))[:, None] & inside[None, :]
    ptrs = x_ptr + sample * stride_x[0] + t[:, None] * stride_x[1] + channels[None, :] * stride_x[2]
    inputs = tl.load(ptrs, mask=there, other=0.0).to(tl.float32)
    if state_ptr is not None:
        row = t + WIDTH - 1
        there = ((row >= 0) & (t < 0))[:, None] & inside[None, :]
        ptrs = state_ptr + sample * stride_state[0] + row[:, None] * stride_state[1]
        ptrs += channels[None, :] * stride_state[2]
        inputs += tl.load(ptrs, mask=there, other=0.0).to(tl.float32)
    return inputs


@triton.jit
def linked(seq_idx_ptr, stride, sample, t, seqlen):
    """Whether token t goes on with the sequence of the token before it."""
    between = (t > 0) & (t < seqlen)
    ptrs = seq_idx_ptr + sample * stride[0] + t * stride[1]
    own = tl.load(ptrs, mask=between, other=0)
    return own == tl.load(ptrs - stride[1], mask=between, other=0)


@triton.jit
def load_taps(
    weight_ptr, bias_ptr, stride_weight, stride_bias, channels, inside, WIDTH: tl.constexpr
):
    """The taps, the one of the current token first, and the bias: [BLOCK_DIM], float32."""
    taps = ()
    for back in tl.static_range(WIDTH):
        ptrs = weight_ptr + channels * stride_weight[0] + (WIDTH - 1 - back) * stride_weight[1]
        taps += (tl.load(ptrs, mask=inside, other=0.0).to(tl.float32),)
    bias = tl.zeros(channels.shape, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channels * stride_bias, mask=inside, other=0.0).to(tl.float32)
    return taps, bias


@routed_jit("seqlen")
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, seq_idx_ptr, count_ptr, samples_ptr,
    out_ptr, final_state_ptr,
    seqlen, dim, stride_x, stride_weight, stride_bias, stride_state, stride_seq, stride_out,
    SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """stride_out: (batch, token, channel). final_state: (batch, WIDTH - 1, dim), contiguous.

    The last program of a row of tiles also writes the final state.
    """
    sample = active_sample(count_ptr, samples_ptr, tl.program_id(2))
    if sample < 0:
        return
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channels = tl.program_id(1).to(tl.int64) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = channels < dim
    taps, bias = load_taps(
        weight_ptr, bias_ptr, stride_weight, stride_bias, channels, inside, WIDTH
    )

    # [BLOCK_T, BLOCK_DIM]
    y = tl.zeros([BLOCK_T, BLOCK_DIM], tl.float32) + bias[None, :]
    same = t >= 0
    for back in tl.static_range(WIDTH):
        if back > 0 and seq_idx_ptr is not None:
            same = same & linked(seq_idx_ptr, stride_seq, sample, t - back + 1, seqlen)
        x = inputs_at(
            x_ptr, state_ptr, stride_x, stride_state, sample, t - back, channels, inside, seqlen,
            WIDTH,
        )  # fmt: skip
        if seq_idx_ptr is not None:
            x = tl.where(same[:, None], x, 0.0)
        y += x * taps[back][None, :]
    if SILU:
        y = silu(y)
    out = out_ptr + sample * stride_out[0] + t[:, None] * stride_out[1]
    out += channels[None, :] * stride_out[2]
    there = (t < seqlen)[:, None] & inside[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=there)

    if tl.program_id(0) == tl.num_programs(0) - 1:
        PLACES: tl.constexpr = 4  # WIDTH - 1, as a power of two
        place = tl.arange(0, PLACES)
        token = seqlen + place.to(tl.int64) - (WIDTH - 1)
        # [PLACES, BLOCK_DIM]
        last = inputs_at(
            x_ptr, state_ptr, stride_x, stride_state, sample, token, channels, inside, seqlen, WIDTH
        )
        if seq_idx_ptr is not None:
            for ahead in tl.static_range(1, WIDTH - 1):
                goes_on = linked(seq_idx_ptr, stride_seq, sample, token + ahead, seqlen)
                last = tl.where(goes_on[:, None], last, 0.0)
        state = final_state_ptr + (sample * (WIDTH - 1) + place[:, None]) * dim + channels[None, :]
        kept = (place < WIDTH - 1)[:, None] & inside[None, :]
        tl.store(state, last.to(final_state_ptr.dtype.element_ty), mask=kept)


@routed_jit("seqlen")
def backward_kernel(
    dout_ptr, dstate_ptr, x_ptr, weight_ptr, bias_ptr, state_ptr, seq_idx_ptr,
    count_ptr, samples_ptr, dx_ptr, dinitial_ptr, shares_ptr,
    seqlen, dim, stride_dout, stride_dstate, stride_x, stride_weight, stride_bias, stride_state,
    stride_seq, stride_dx,
    SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of the input, whose first rows are those before token 0.

    dinitial_state: contiguous. shares: (places, tiles, WIDTH + 1, dim), float32: of the taps,
    the current token's first, and of the bias.
    """
    sample = active_sample(count_ptr, samples_ptr, tl.program_id(2))
    if sample < 0:
        return
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T) - (WIDTH - 1)
    channels = tl.program_id(1).to(tl.int64) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = channels < dim
    taps, bias = load_taps(
        weight_ptr, bias_ptr, stride_weight, stride_bias, channels, inside, WIDTH
    )

    # The input from WIDTH - 1 tokens before to as many after, each [BLOCK_T, BLOCK_DIM], and
    # which of them go on with the one before, each [BLOCK_T]
    xs, links = (), ()
    for place in tl.static_range(2 * WIDTH - 1):
        xs += (
            inputs_at(
                x_ptr, state_ptr, stride_x, stride_state, sample, t + place - (WIDTH - 1),
                channels, inside, seqlen, WIDTH,
            ),
        )  # fmt: skip
        if seq_idx_ptr is not None:
            links += (linked(seq_idx_ptr, stride_seq, sample, t + place - (WIDTH - 1), seqlen),)

    dinputs = tl.zeros([BLOCK_T, BLOCK_DIM], tl.float32)
    shares_ptr += (
        (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (WIDTH + 1) * dim
    )
    reached = t < seqlen  # tokens of one sequence from t on to t + ahead
    for ahead in tl.static_range(WIDTH):
        s = t + ahead
        there = ((s >= 0) & (s < seqlen))[:, None] & inside[None, :]
        ptrs = dout_ptr + sample * stride_dout[0] + s[:, None] * stride_dout[1]
        ptrs += channels[None, :] * stride_dout[2]
        dy = tl.load(ptrs, mask=there, other=0.0).to(tl.float32)
        if SILU:
            y = tl.zeros([BLOCK_T, BLOCK_DIM], tl.float32) + bias[None, :]
            same = t < seqlen
            for back in tl.static_range(WIDTH):
                x = xs[WIDTH - 1 + ahead - back]
                if seq_idx_ptr is not None:
                    if back > 0:
                        same = same & links[WIDTH + ahead - back]
                    x = tl.where(same[:, None], x, 0.0)
                y += x * taps[back][None, :]
            gate = sigmoid(y)
            dy *= gate * (1 + y * (1 - gate))
        if ahead == 0:
            same = t < seqlen
            for back in tl.static_range(WIDTH):
                x = xs[WIDTH - 1 - back]
                if seq_idx_ptr is not None:
                    if back > 0:
                        same = same & links[WIDTH - back]
                    x = tl.where(same[:, None], x, 0.0)
                tl.store(shares_ptr + back * dim + channels, tl.sum(dy * x, 0), mask=inside)
            tl.store(shares_ptr + WIDTH * dim + channels, tl.sum(dy, 0), mask=inside)
        if seq_idx_ptr is not None:
            if ahead > 0:
                reached = reached & links[WIDTH - 1 + ahead]
            dy = tl.where(reached[:, None], dy, 0.0)
        dinputs += dy * taps[ahead][None, :]

    if dstate_ptr is not None:
        place = t - (seqlen - (WIDTH - 1))
        held = (place >= 0) & (place < WIDTH - 1)
        ptrs = dstate_ptr + sample * stride_dstate[0] + place[:, None] * stride_dstate[1]
        ptrs += channels[None, :] * stride_dstate[2]
        dstate = tl.load(ptrs, mask=held[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if seq_idx_ptr is not None:
            for ahead in tl.static_range(1, WIDTH - 1):
                dstate = tl.where(links[WIDTH - 1 + ahead][:, None], dstate, 0.0)
        dinputs += dstate

    there = ((t >= 0) & (t < seqlen))[:, None] & inside[None, :]
    dx = dx_ptr + sample * stride_dx[0] + t[:, None] * stride_dx[1]
    dx += channels[None, :] * stride_dx[2]
    tl.store(dx, dinputs.to(dx_ptr.dtype.element_ty), mask=there)
    if dinitial_ptr is not None:
        there = (t < 0)[:, None] & inside[None, :]
        row = sample * (WIDTH - 1) + t[:, None] + WIDTH - 1
        dinitial = dinitial_ptr + row * dim + channels[None, :]
        tl.store(dinitial, dinputs.to(dinitial_ptr.dtype.element_ty), mask=there)


def configure(kernel: str, x: Tensor, width: int, packed: bool) -> dict[str, int]:
    """The tile of a kernel, forward or backward, and its warps. packed: whether seq_idx is there.

    Untuned: 64 lanes along what is contiguous, channels or time; along the other, 32 forward, and
    16 backward, where a lane holds more.
    """
    batch, seqlen, dim = x.shape
    along_time = x.stride(1) == 1 and x.stride(2) != 1
    others = 32 if kernel == "forward" else 16
    tokens, channels = (64, others) if along_time else (others, 64)
    facts = {"dtype": str(x.dtype), "width": width, "packed": packed, "along_time": along_time}
    sizes = {"tokens": (batch * seqlen, 65536), "channels": (dim, 16384)}
    heuristic = {"BLOCK_T": tokens, "BLOCK_DIM": channels, "num_warps": 4}
    return configs.choose(f"causal_conv1d.{kernel}", facts, sizes, heuristic)


def forward(x, weight, bias, initial_state, seq_idx, count, samples, activation, out=None):
    refuse_float64(x=x, weight=weight, bias=bias, initial_state=initial_state)
    refuse_more_samples_than_programs(len(x))
    batch, seqlen, dim = x.shape
    width = weight.shape[1]
    out = x.new_empty(x.shape) if out is None else out
    final_state = x.new_empty((batch, width - 1, dim))
    options = configure("forward", x, width, seq_idx is not None)
    # Tiles of time come first, as only the first axis takes more than 65535 programs
    grid = (cdiv(seqlen, options["BLOCK_T"]), cdiv(dim, options["BLOCK_DIM"]), batch)
    forward_kernel[grid](
        x, weight, bias, initial_state, seq_idx, count, samples, out, final_state,
        seqlen, dim, x.stride(), weight.stride(), *strides(bias, 1), strides(initial_state, 3),
        strides(seq_idx, 2), out.stride(),
        SILU=activation == "silu", WIDTH=width, **options,
    )  # fmt: skip
    return out, final_state


def backward(
    dout, dfinal_state, x, weight, bias, initial_state, seq_idx, count, samples, activation, dx=None
):
    batch, seqlen, dim = x.shape
    width = weight.shape[1]
    dx = x.new_empty(x.shape) if dx is None else dx
    dinitial_state = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    options = configure("backward", x, width, seq_idx is not None)
    tiles = cdiv(seqlen + width - 1, options["BLOCK_T"])
    # Places past the route's last write nothing
    fresh = x.new_empty if count is None else x.new_zeros
    shares = fresh((batch, tiles, width + 1, dim), dtype=torch.float32)
    backward_kernel[(tiles, cdiv(dim, options["BLOCK_DIM"]), batch)](
        dout, dfinal_state, x, weight, bias, initial_state, seq_idx, count, samples,
        dx, dinitial_state, shares,
        seqlen, dim, dout.stride(), strides(dfinal_state, 3), x.stride(), weight.stride(),
        *strides(bias, 1), strides(initial_state, 3), strides(seq_idx, 2), dx.stride(),
        SILU=activation == "silu", WIDTH=width, **options,
    )  # fmt: skip
    *taps, dbias = shares.sum((0, 1))
    dweight = torch.stack(taps[::-1], 1).to(weight.dtype)
    return dx, dweight, None if bias is None else dbias.to(bias.dtype, copy=True), dinitial_state
