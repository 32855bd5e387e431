"""Triton kernel and launcher: a program takes some channels of one sample, token after token.

Floor: latency. A step of one token reads and writes some 4 numbers per channel: at 4096 channels
and 64 samples that is 4 MB, about a microsecond of an H200's 4.8 TB/s. Not measured.
"""

import triton.language as tl
from torch import Tensor

from .. import configs
from ..exponentials import silu
from ..launch import cdiv, next_power_of_2, refuse_more_samples_than_programs, strides
from ..precision import refuse_float64
from ..routing.gate import active_sample, routed_jit


@routed_jit("seqlen", "state_len")
def update_kernel(
    x_ptr, state_ptr, weight_ptr, bias_ptr, seqlens_ptr, indices_ptr, count_ptr, samples_ptr,
    out_ptr,
    seqlen, state_len, dim, stride_x, stride_state, stride_weight, stride_bias,
    SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """stride_x: (batch, token, channel). stride_state: (entry, place, channel)."""
    sample = active_sample(count_ptr, samples_ptr, tl.program_id(1))
    if sample < 0:
        return
    channels = tl.program_id(0).to(tl.int64) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = channels < dim
    out_ptrs = out_ptr + sample * seqlen * dim + channels
    x_ptrs = x_ptr + sample * stride_x[0] + channels * stride_x[2]
    entry = sample
    if indices_ptr is not None:
        entry = tl.load(indices_ptr + sample).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * 0
    if entry < 0:
        while t < seqlen:
            zeros = tl.zeros([BLOCK_DIM], out_ptr.dtype.element_ty)
            tl.store(out_ptrs + t * dim, zeros, mask=inside)
            t += 1
        return
    state_ptrs = state_ptr + entry * stride_state[0] + channels * stride_state[2]
    held = state_ptr.dtype.element_ty

    # In a ring the next token's place; otherwise as if it came after the last place.
    place = t + state_len
    if seqlens_ptr is not None:
        place = tl.load(seqlens_ptr + sample).to(tl.int64) % state_len + state_len
    # [BLOCK_DIM]; the inputs before the next token, the oldest first
    window = ()
    for k in tl.static_range(WIDTH - 1):
        before = place - (WIDTH - 1) + k
        if seqlens_ptr is not None:
            before = before % state_len
        of_state = state_ptrs + before * stride_state[1]
        window += (tl.load(of_state, mask=inside, other=0.0).to(tl.float32),)
    taps = ()
    for k in tl.static_range(WIDTH):
        of_weight = weight_ptr + channels * stride_weight[0] + k * stride_weight[1]
        taps += (tl.load(of_weight, mask=inside, other=0.0).to(tl.float32),)
    bias = tl.zeros([BLOCK_DIM], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channels * stride_bias, mask=inside, other=0.0).to(tl.float32)

    while t < seqlen:
        token = tl.load(x_ptrs + t * stride_x[1], mask=inside, other=0.0).to(held)
        if seqlens_ptr is not None:
            slot = state_ptrs + (place + t) % state_len * stride_state[1]
            tl.store(slot, token, mask=inside)
        token = token.to(tl.float32)
        y = bias + token * taps[WIDTH - 1]
        for k in tl.static_range(WIDTH - 1):
            y += window[k] * taps[k]
        if SILU:
            y = silu(y)
        tl.store(out_ptrs + t * dim, y.to(out_ptr.dtype.element_ty), mask=inside)
        window = window[1:] + (token,)  # noqa: RUF005 (Triton unpacks no tuples)
        t += 1

    if seqlens_ptr is None:
        kept = t * 0
        while kept + seqlen < state_len:  # each place takes from a later one, so none is lost
            behind = state_ptrs + (kept + seqlen) * stride_state[1]
            old = tl.load(behind, mask=inside, other=0.0)
            tl.store(state_ptrs + kept * stride_state[1], old, mask=inside)
            kept += 1
        while kept < state_len:
            arriving = x_ptrs + (kept + seqlen - state_len) * stride_x[1]
            new = tl.load(arriving, mask=inside, other=0.0).to(held)
            tl.store(state_ptrs + kept * stride_state[1], new, mask=inside)
            kept += 1


def update(
    x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, count, samples
) -> Tensor:
    refuse_float64(x=x, conv_state=conv_state, weight=weight, bias=bias)
    refuse_more_samples_than_programs(len(x))
    batch, seqlen, dim = x.shape
    options = configure(x, weight.shape[1], cache_seqlens is not None)
    out = x.new_empty(x.shape)
    update_kernel[(cdiv(dim, options["BLOCK_DIM"]), batch)](
        x, conv_state, weight, bias, cache_seqlens, conv_state_indices, count, samples, out,
        seqlen, conv_state.shape[1], dim, x.stride(), conv_state.stride(), weight.stride(),
        *strides(bias, 1),
        SILU=activation == "silu", WIDTH=weight.shape[1], **options,
    )  # fmt: skip
    return out


def configure(x: Tensor, width: int, ring: bool) -> configs.Config:
    """How many channels a program takes, and its warps."""
    batch, seqlen, dim = x.shape
    facts = {"dtype": str(x.dtype), "width": width, "ring": ring}
    sizes = {"tokens": (batch * seqlen, 1024), "channels": (dim, 16384)}
    heuristic = {"BLOCK_DIM": min(256, next_power_of_2(dim)), "num_warps": 4}
    return configs.choose("causal_conv1d_update.update", facts, sizes, heuristic)
