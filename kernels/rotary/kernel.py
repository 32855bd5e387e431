"""Triton kernel and launcher: a program turns some rows, each one head of one token.

Floor: bytes. An element is read and written once, 4 bytes in 16 bits; its angles, half as many
float32 numbers per token as a head has channels, are read for every head, though from L2. The
arithmetic is 3 instructions per channel. Its share of the 4.8 TB/s of an H200: not measured.
"""

import triton.language as tl
from torch import Tensor

from .. import configs
from ..launch import cdiv, next_power_of_2, refuse_more_samples_than_programs, strides
from ..precision import refuse_float64
from ..routing.gate import active_sample, routed_jit


@routed_jit()
def rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, count_ptr, samples_ptr, out_ptr,
    seqlen, heads, stride_x, stride_out, stride_cos, stride_sin,
    HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """stride_x, stride_out: (batch, seqlen, heads, head_dim). stride_cos: (batch, seqlen, pair)."""
    sample = active_sample(count_ptr, samples_ptr, tl.program_id(1))
    if sample < 0:
        return
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t, head = row // heads, row % heads
    x_ptr += sample * stride_x[0]
    out_ptr += sample * stride_out[0]
    x_rows = (x_ptr + t * stride_x[1] + head * stride_x[2])[:, None]
    out_rows = (out_ptr + t * stride_out[1] + head * stride_out[2])[:, None]

    pair = tl.arange(0, BLOCK).to(tl.int64)
    there = (t < seqlen)[:, None] & (pair < HALF)[None, :]
    if INTERLEAVED:
        first, second = 2 * pair[None, :], 2 * pair[None, :] + 1
    else:
        first, second = pair[None, :], pair[None, :] + HALF
    # [ROWS, BLOCK]
    angle = t[:, None] * stride_cos[1] + pair[None, :] * stride_cos[2]
    cos = tl.load(cos_ptr + sample * stride_cos[0] + angle, mask=there, other=0.0)
    angle = t[:, None] * stride_sin[1] + pair[None, :] * stride_sin[2]
    sin = tl.load(sin_ptr + sample * stride_sin[0] + angle, mask=there, other=0.0)
    a = tl.load(x_rows + first * stride_x[3], mask=there, other=0.0).to(tl.float32)
    b = tl.load(x_rows + second * stride_x[3], mask=there, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_rows + first * stride_out[3], (a * cos - b * sin).to(dtype), mask=there)
    tl.store(out_rows + second * stride_out[3], (b * cos + a * sin).to(dtype), mask=there)
    if REST > 0:  # channels that do not turn
        rest = tl.arange(0, BLOCK_REST).to(tl.int64)
        there = (t < seqlen)[:, None] & (rest < REST)[None, :]
        channel = (2 * HALF + rest)[None, :]
        kept = tl.load(x_rows + channel * stride_x[3], mask=there, other=0.0)
        tl.store(out_rows + channel * stride_out[3], kept, mask=there)


def forward(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    count: Tensor | None,
    samples: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """out may be x itself: a program reads all its pairs before it writes one."""
    refuse_float64(x=x)
    refuse_more_samples_than_programs(len(x))
    batch, seqlen, heads, head_dim = x.shape
    half = cos.shape[-1]
    rest = head_dim - 2 * half
    block, block_rest = (next_power_of_2(max(1, n)) for n in (half, rest))
    options = configure(x, max(block, block_rest), interleaved)
    out = x.new_empty(x.shape) if out is None else out
    rotary_kernel[(cdiv(seqlen * heads, options["ROWS"]), batch)](
        x, cos, sin, count, samples, out,
        seqlen, heads, x.stride(), out.stride(), strides(cos, 3), strides(sin, 3),
        HALF=half, REST=rest, INTERLEAVED=interleaved, BLOCK=block, BLOCK_REST=block_rest,
        **options,
    )  # fmt: skip
    return out


def configure(x: Tensor, width: int, interleaved: bool) -> configs.Config:
    """A tile's rows and its warps; untuned, tiles of 1024. width: of a tile."""
    batch, seqlen, heads, _ = x.shape
    facts = {"dtype": str(x.dtype), "width": width, "interleaved": interleaved}
    sizes = {"rows": (batch * seqlen * heads, 2**20)}
    heuristic = {"ROWS": max(1, 1024 // width), "num_warps": 4}
    return configs.choose("rotary.forward", facts, sizes, heuristic)
