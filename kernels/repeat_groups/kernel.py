"""Triton kernels and launchers: a program takes a tile of tokens and channels, and their copies.

Floor: bytes. Both directions move a channel once and each of its copies once: in 16 bits, 2 · (1 +
repeats) bytes per channel, 10 with 4 repeats. A group of 16 channels is 32 bytes, one sector, so no
transfer is split. The arithmetic is one addition per copy, of the gradient alone. Its share of the
4.8 TB/s of an H200: not measured.
"""

import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..launch import cdiv, next_power_of_2, refuse_more_samples_than_programs
from ..precision import refuse_float64
from ..routing.gate import active_sample, routed_jit


@triton.jit
def tile_of(
    once_ptr, copies_ptr, stride_once, stride_copies, sample, seqlen, dim,
    GROUP: tl.constexpr, REPEATS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Pointers to this program's channels and to their first copies, and which of them are there.

    [BLOCK_T, BLOCK_DIM]. stride_once, stride_copies: (batch, token, channel).
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    first = channel + channel // GROUP * (GROUP * (REPEATS - 1))
    there = (t < seqlen)[:, None] & (channel < dim)[None, :]
    once_ptr += sample * stride_once[0]
    copies_ptr += sample * stride_copies[0]
    channel, first = channel.to(tl.int64), first.to(tl.int64)
    once = once_ptr + t[:, None] * stride_once[1] + channel[None, :] * stride_once[2]
    copies = copies_ptr + t[:, None] * stride_copies[1] + first[None, :] * stride_copies[2]
    return once, copies, there


@routed_jit("seqlen")
def repeat_kernel(
    x_ptr, out_ptr, count_ptr, samples_ptr, seqlen, dim, stride_x, stride_out,
    GROUP: tl.constexpr, REPEATS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    sample = active_sample(count_ptr, samples_ptr, tl.program_id(2))
    if sample < 0:
        return
    xs, outs, there = tile_of(
        x_ptr, out_ptr, stride_x, stride_out, sample, seqlen, dim,
        GROUP, REPEATS, BLOCK_T, BLOCK_DIM,
    )  # fmt: skip
    x = tl.load(xs, mask=there, other=0.0).to(out_ptr.dtype.element_ty)
    for _ in tl.range(REPEATS, loop_unroll_factor=4):
        tl.store(outs, x, mask=there)
        outs += tl.cast(GROUP, tl.int64) * stride_out[2]


@routed_jit("seqlen")
def add_up_kernel(
    x_ptr, out_ptr, count_ptr, samples_ptr, seqlen, dim, stride_x, stride_out,
    GROUP: tl.constexpr, REPEATS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """The sum of the copies in x, the first one first."""
    sample = active_sample(count_ptr, samples_ptr, tl.program_id(2))
    if sample < 0:
        return
    outs, xs, there = tile_of(
        out_ptr, x_ptr, stride_out, stride_x, sample, seqlen, dim,
        GROUP, REPEATS, BLOCK_T, BLOCK_DIM,
    )  # fmt: skip
    total = tl.zeros([BLOCK_T, BLOCK_DIM], tl.float32)
    for _ in tl.range(REPEATS, loop_unroll_factor=4):
        total += tl.load(xs, mask=there, other=0.0).to(tl.float32)
        xs += tl.cast(GROUP, tl.int64) * stride_x[2]
    tl.store(outs, total.to(out_ptr.dtype.element_ty), mask=there)


def repeat(
    out: Tensor, x: Tensor, group: int, count: Tensor | None, samples: Tensor | None
) -> None:
    launch(repeat_kernel, "repeat", out, x, group, count, samples)


def add_up(
    out: Tensor, x: Tensor, group: int, count: Tensor | None, samples: Tensor | None
) -> None:
    launch(add_up_kernel, "add_up", out, x, group, count, samples)


def launch(kernel, name, out, x, group, count, samples):
    """Tiles cover the narrower of x and out."""
    refuse_float64(x=x, out=out)
    refuse_more_samples_than_programs(len(x))
    dim, wider = sorted((x.shape[2], out.shape[2]))
    batch, seqlen, _ = x.shape
    options = configure(name, x, dim, group, wider // dim)
    grid = (cdiv(seqlen, options["BLOCK_T"]), cdiv(dim, options["BLOCK_DIM"]), batch)
    kernel[grid](
        x, out, count, samples, seqlen, dim, x.stride(), out.stride(),
        GROUP=group, REPEATS=wider // dim, **options,
    )  # fmt: skip


def configure(kernel: str, x: Tensor, dim: int, group: int, repeats: int) -> configs.Config:
    """A tile and its warps; untuned, 2048 channels, along channels first. dim: of the narrower."""
    batch, seqlen, _ = x.shape
    # What loads are as wide as: the power of two that divides a group
    facts = {"dtype": str(x.dtype), "repeats": repeats, "group": min(group & -group, 16)}
    sizes = {"tokens": (batch * seqlen, 65536), "channels": (dim, 4096)}
    block_dim = min(next_power_of_2(dim), 256)
    heuristic = {"BLOCK_T": 2048 // block_dim, "BLOCK_DIM": block_dim, "num_warps": 4}
    return configs.choose(f"repeat_groups.{kernel}", facts, sizes, heuristic)
