"""Triton kernels and launchers: tiles of y = x Wᵀ, and of dW = Σ dyᵀ x.

As many programs as the GPU holds share out the tiles of y; a tile is of one sample, so with no
sample there is no tile, and the programs leave after one load. Tiles that run together are
neighbours in both directions, so that most of what they read comes from L2. On Hopper descriptors
load and store tiles of 16-bit numbers, whose addresses would take a quarter of the registers; what
they cannot describe goes through pointers, as on other GPUs.

A program adds up a tile of dW over all tokens. Where tiles are too few to fill the GPU, programs
share the tokens of a tile, and `sum_kernel` adds up their parts in one order: no atomics, and
always the same bits.

Floor: FLOPs, 2 · tokens · in_features · out_features each for y, dx and dW. On Hopper an SM does
4096 dense 16-bit FLOPs per cycle; a tile of 128 × 256 takes 1024 cycles for 64 steps of the inner
dimension, in which it reads 48 KB, 48 bytes per cycle of the 64 that an SM gets from L2. An H200's
132 SMs at 1.98 GHz take at least 0.13 ms for 4 · 4096 tokens, 2048 to 2048. float32 has no matrix
unit: 256 FLOPs per cycle. How near the kernels come: not measured.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..descriptors import LEAST_ARCH, describable, describe, pay
from ..dot import dot
from ..launch import cdiv, strides
from ..precision import refuse_float64
from ..routing.gate import active_samples, routed_jit, sample_at
from ..target import arch, processors

GROUP = tl.constexpr(8)  # rows of tiles that are walked together


@triton.jit
def tile_at(tile, rows, columns):
    """Row and column of a tile: GROUP rows at a time, column by column."""
    width = GROUP * columns
    first = tile // width * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + tile % width % height, tile % width // height


@triton.jit
def load_tokens(tiles, sample, t, feature):
    """A tile [tokens, features] of one sample, by its descriptor."""
    tile = tiles.load([sample.to(tl.int32), t.to(tl.int32), tl.cast(feature, tl.int32)])
    return tile.reshape(tile.shape[1], tile.shape[2])


@routed_jit("batch", "seqlen")
def linear_kernel(
    x_ptr, weight_ptr, bias_ptr, count_ptr, samples_ptr, out_ptr, x_tiles, weight_tiles, out_tiles,
    batch, seqlen, in_features, out_features, stride_x, stride_weight, stride_bias, stride_out,
    ACCUMULATE: tl.constexpr, EVEN_K: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th tile of the active samples.

    x_tiles, weight_tiles, out_tiles: descriptors of the same, the first two or all, or None.
    stride_x, stride_out: (batch, seqlen, feature). stride_weight: (out, in). TRANSPOSED: whether
    weight_tiles are (in, out).
    """
    # The next tile is loaded while this one is stored, unless that takes another layout, for which
    # there is no shared memory left
    OVERLAP: tl.constexpr = out_tiles is not None and bias_ptr is None and not ACCUMULATE
    active = active_samples(count_ptr, batch)
    if x_tiles is not None and active == 0:  # or loads would go ahead of the loop's first test
        return
    tiles_m, tiles_n = tl.cdiv(seqlen, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    rows = active * tiles_m
    for tile in tl.range(tl.program_id(0), rows * tiles_n, tl.num_programs(0), flatten=OVERLAP):
        row, column = tile_at(tile, rows, tiles_n)
        sample = sample_at(samples_ptr, row // tiles_m)
        first_t, first_n = (row % tiles_m).to(tl.int64) * BLOCK_M, column.to(tl.int64) * BLOCK_N
        t, n = first_t + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K).to(tl.int64)
        of_x, of_weight = (t < seqlen)[:, None], (n < out_features)[None, :]
        out = out_ptr + sample * stride_out[0]

        # [BLOCK_M, BLOCK_N]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if ACCUMULATE and out_tiles is not None:
            acc += load_tokens(out_tiles, sample, first_t, first_n)
        elif ACCUMULATE:  # from the start, as at the end there are no registers for it
            outs = out + t[:, None] * stride_out[1] + n[None, :] * stride_out[2]
            acc += tl.load(outs, mask=of_x & of_weight, other=0.0).to(tl.float32)
        xs = x_ptr + sample * stride_x[0] + t[:, None] * stride_x[1] + k[None, :] * stride_x[2]
        weights = weight_ptr + n[None, :] * stride_weight[0] + k[:, None] * stride_weight[1]
        for first in tl.range(0, in_features, BLOCK_K):
            # [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_N]
            if x_tiles is not None:
                x = load_tokens(x_tiles, sample, first_t, first)
                if TRANSPOSED:
                    weight = weight_tiles.load([first, first_n.to(tl.int32)])
                else:
                    weight = weight_tiles.load([first_n.to(tl.int32), first]).T
            else:
                x_there, weight_there = of_x, of_weight
                if not EVEN_K:
                    inside = first + k < in_features
                    x_there, weight_there = of_x & inside[None, :], of_weight & inside[:, None]
                x = tl.load(xs, mask=x_there, other=0.0)
                weight = tl.load(weights, mask=weight_there, other=0.0)
                xs += tl.cast(BLOCK_K, tl.int64) * stride_x[2]
                weights += tl.cast(BLOCK_K, tl.int64) * stride_weight[1]
            acc = dot(x, weight.to(x.dtype), acc)

        if bias_ptr is not None:
            bias = tl.load(bias_ptr + n * stride_bias, mask=n < out_features, other=0.0)
            acc += bias.to(x_ptr.dtype.element_ty).to(tl.float32)[None, :]
        if out_tiles is not None:
            values = acc.to(out_tiles.dtype).reshape(1, BLOCK_M, BLOCK_N)
            place = [sample.to(tl.int32), first_t.to(tl.int32), first_n.to(tl.int32)]
            out_tiles.store(place, values)
        else:
            outs = out + t[:, None] * stride_out[1] + n[None, :] * stride_out[2]
            tl.store(outs, acc.to(out_ptr.dtype.element_ty), mask=of_x & of_weight)


@routed_jit("batch", "seqlen")
def weight_gradient_kernel(
    dout_ptr, x_ptr, count_ptr, samples_ptr, written_ptr, grad_ptr, bias_grad_ptr,
    dout_tiles, x_tiles,
    batch, seqlen, in_features, out_features, stride_dout, stride_x, stride_grad, stride_bias_grad,
    EVEN: tl.constexpr, EVEN_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient, over one segment of the tokens of all active samples.

    dout_tiles, x_tiles: descriptors of the same, or None. stride_dout, stride_x: (batch, seqlen,
    feature). stride_grad: (segment, out, in). stride_bias_grad: (segment, out). Programs of the
    first column write the bias's gradient.
    EVEN: whether tiles cover the gradient exactly, which saves the registers of masks.
    """
    active = active_samples(count_ptr, batch)
    if active == 0:
        return
    tiles_n, tiles_k = tl.cdiv(out_features, BLOCK_N), tl.cdiv(in_features, BLOCK_K)
    row, column = tile_at(tl.program_id(0), tiles_n, tiles_k)
    n = row.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = column.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    token = tl.arange(0, BLOCK_T).to(tl.int64)
    of_dout = ((n < out_features) | EVEN)[:, None]
    of_x = ((k < in_features) | EVEN)[None, :]
    segment = tl.program_id(1).to(tl.int64)
    grad = grad_ptr + segment * stride_grad[0]

    # [BLOCK_N, BLOCK_K]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if written_ptr is not None:  # from the start, as at the end there are no registers for it
        held = (tl.zeros([1, 1], tl.int32) + tl.load(written_ptr)) > 0
        grads = grad + n[:, None] * stride_grad[1] + k[None, :] * stride_grad[2]
        acc += tl.load(grads, mask=of_dout & of_x & held, other=0.0).to(tl.float32)
    # [BLOCK_N, 16], columns alike: products with ones, as a sum would wait for all warps
    bias_acc = tl.zeros([BLOCK_N, 16], tl.float32)
    ones = tl.full([BLOCK_T, 16], 1.0, tl.float32).to(dout_ptr.dtype.element_ty)

    douts = dout_ptr + n[:, None] * stride_dout[2] + token[None, :] * stride_dout[1]
    xs = x_ptr + token[:, None] * stride_x[1] + k[None, :] * stride_x[2]
    tiles_t = tl.cdiv(seqlen, BLOCK_T)
    steps = active.to(tl.int64) * tiles_t
    start = (steps * segment // tl.num_programs(1)).to(tl.int32)
    stop = (steps * (segment + 1) // tl.num_programs(1)).to(tl.int32)
    place, first = start // tiles_t, (start % tiles_t).to(tl.int64) * BLOCK_T
    sample = sample_at(samples_ptr, tl.minimum(place, active - 1))
    for _ in tl.range(start, stop):
        # [BLOCK_N, BLOCK_T] and [BLOCK_T, BLOCK_K]
        if dout_tiles is not None:
            dout = load_tokens(dout_tiles, sample, first, row * BLOCK_N).T
            x = load_tokens(x_tiles, sample, first, column * BLOCK_K)
        else:
            dout_there, x_there = of_dout, of_x
            if not EVEN_T:
                inside = first + token < seqlen
                dout_there, x_there = of_dout & inside[None, :], of_x & inside[:, None]
            offset = sample * stride_dout[0] + first * stride_dout[1]
            dout = tl.load(douts + offset, mask=dout_there, other=0.0)
            offset = sample * stride_x[0] + first * stride_x[1]
            x = tl.load(xs + offset, mask=x_there, other=0.0)
        acc = dot(dout, x, acc)
        if bias_grad_ptr is not None:
            bias_acc = dot(dout, ones, bias_acc)
        # The sample of the next step, loaded a step early, so that the pipeline need not wait
        first += BLOCK_T
        ended = first >= seqlen
        first = tl.where(ended, 0, first)
        place = tl.where(ended, place + 1, place)
        sample = sample_at(samples_ptr, tl.minimum(place, active - 1))

    grads = grad + n[:, None] * stride_grad[1] + k[None, :] * stride_grad[2]
    tl.store(grads, acc.to(grad_ptr.dtype.element_ty), mask=of_dout & of_x)
    if bias_grad_ptr is not None:
        bias_grads = bias_grad_ptr + segment * stride_bias_grad[0] + n * stride_bias_grad[1]
        there = n < tl.where(column == 0, out_features, 0)
        bias = tl.max(bias_acc, 1)
        if written_ptr is not None:
            held = n < tl.where((column == 0) & (tl.load(written_ptr) > 0), out_features, 0)
            bias += tl.load(bias_grads, mask=held, other=0.0).to(tl.float32)
        tl.store(bias_grads, bias.to(bias_grad_ptr.dtype.element_ty), mask=there)


@routed_jit("segments")
def sum_kernel(
    parts_ptr, count_ptr, written_ptr, grad_ptr, segments, size, columns, stride_grad,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Some elements of a gradient: the sum over the segments, the first one first.

    parts: (segments, size), float32, contiguous. stride_grad: (out, in).
    """
    if count_ptr is not None:
        if tl.load(count_ptr) == 0:
            return
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = index < size
    # [BLOCK]
    total = tl.zeros([BLOCK], tl.float32)
    for segment in tl.range(0, segments):
        parts = parts_ptr + tl.cast(segment, tl.int64) * size + index
        total += tl.load(parts, mask=there, other=0.0)
    grads = grad_ptr + index // columns * stride_grad[0] + index % columns * stride_grad[1]
    if written_ptr is not None:
        held = index < tl.where(tl.load(written_ptr) > 0, size, 0)
        total += tl.load(grads, mask=held, other=0.0).to(tl.float32)
    tl.store(grads, total.to(grad_ptr.dtype.element_ty), mask=there)


class Tile(NamedTuple):
    """A tile of the result, the inner dimension of a step, and how it runs.

    programs: that a multiprocessor holds at once. described: whether operands are loaded by
    descriptors.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    programs: int
    described: int = 0


# From the largest to the smallest. Found by compiling offline: they spill no register.
DESCRIBED = (  # sm_90, sm_100, 16-bit operands that descriptors can load
    Tile(128, 256, 64, 8, 3, 1, 1),
    Tile(128, 128, 64, 8, 4, 1, 1),
    Tile(64, 256, 64, 8, 3, 1, 1),
    Tile(128, 64, 64, 4, 3, 2, 1),
    Tile(64, 128, 64, 4, 3, 2, 1),
    Tile(64, 64, 64, 4, 3, 3, 1),
    Tile(16, 128, 64, 4, 3, 2, 1),
)
WARPGROUPS = (  # sm_90, sm_100: 227 KB of shared memory, products by warpgroups
    Tile(128, 256, 64, 8, 4, 1),
    Tile(128, 128, 64, 8, 3, 1),
    Tile(64, 256, 64, 8, 3, 1),
    Tile(128, 64, 64, 4, 3, 2),
    Tile(64, 128, 64, 4, 3, 2),
    Tile(64, 64, 64, 4, 3, 3),
    Tile(16, 128, 64, 4, 3, 2),
)
WARPS = (  # every other: 99 KB, products by warps
    Tile(128, 128, 32, 8, 3, 1),
    Tile(128, 64, 32, 4, 3, 2),
    Tile(64, 128, 32, 4, 3, 2),
    Tile(64, 64, 32, 4, 4, 3),
    Tile(16, 64, 64, 4, 3, 3),
)
SCATTERED = (  # 16-bit operands that are loaded number by number
    Tile(64, 64, 32, 4, 2, 2),
    Tile(16, 64, 32, 4, 2, 2),
)
LANES = (  # float32, whose products have no matrix unit
    Tile(128, 64, 16, 8, 4, 1),
    Tile(64, 64, 16, 4, 3, 2),
    Tile(16, 64, 32, 4, 3, 2),
)
SHORTEST = 16  # steps of a segment that are worth a part of their own
SUMMED = 1024  # elements that a program of sum_kernel adds up


def configure(
    kernel: str, rows: int, columns: int, inner: int, copies: int, fill: int, left: Tensor,
    right: Tensor, described: bool, busy: bool,
) -> Tile:  # fmt: skip
    """The tile of a kernel, forward or weight_gradient.

    rows, columns, copies: of the result. inner: the dimension that is summed over. fill: the
    processors to fill. left, right: the operands of the products. described: whether descriptors
    can load them. busy: whether anything else takes registers, so that the largest tile of all
    would spill.
    """
    vectors, gpu = loads_vectors(left) and loads_vectors(right), arch()
    described = described and gpu >= LEAST_ARCH
    facts = {
        "left": str(left.dtype), "right": str(right.dtype), "vectors": vectors, "busy": busy,
        "transposed": right.stride(-1) != 1, "described": described,
    }  # fmt: skip
    sizes = {"rows": (copies * rows, 16384), "columns": (columns, 16384), "inner": (inner, 16384)}
    described = described and (pay(copies * rows * columns * inner) or not vectors)
    tile = heuristic(gpu, rows, columns, copies, fill, left.dtype, vectors, described, busy)
    return Tile(**configs.choose(f"linear.{kernel}", facts, sizes, tile._asdict()))


@lru_cache(maxsize=4096)
def heuristic(
    arch: int, rows: int, columns: int, copies: int, fill: int, dtype: torch.dtype, vectors: bool,
    described: bool, busy: bool,
) -> Tile:  # fmt: skip
    """Untuned, the largest tile that leaves less than a quarter idle: of itself, and of `fill`
    processors."""
    if dtype == torch.float32:
        tiles, busy = LANES, busy or not vectors
    elif described and arch in (90, 100):
        tiles = DESCRIBED
    elif vectors:
        tiles = WARPGROUPS if arch in (90, 100) else WARPS
    else:
        tiles = SCATTERED

    def count(tile: Tile) -> int:
        return copies * cdiv(rows, tile.rows) * cdiv(columns, tile.columns)

    def work(tile: Tile) -> int:
        return count(tile) * tile.rows * tile.columns

    tiles = tiles[busy:]
    for tile in tiles:
        if 3 * work(tile) <= 4 * copies * rows * columns and 4 * count(tile) >= 3 * fill:
            return tile
    return min(reversed(tiles), key=work)


def loads_vectors(operand: Tensor) -> bool:
    """Whether 16 bytes of it can be loaded at once, as far as Triton knows."""
    strides = [stride for stride in operand.stride() if stride != 1]
    return len(strides) < operand.ndim and not any(stride % 16 for stride in strides)


def by_rows(matrix: Tensor) -> Tensor:
    """It or its transpose, whose rows are contiguous if either's are."""
    return matrix if matrix.stride(-1) == 1 else matrix.mT


def launch_options(tile: Tile, *names: str) -> dict[str, int]:
    """The tile's sides under the names that a kernel gives them."""
    sides = zip(names, tile[:3], strict=True)
    return {**dict(sides), "num_warps": tile.warps, "num_stages": tile.stages}


def joined(count: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Without a route, samples that lie one after the other are one long sample."""
    if count is not None or any(
        x.shape[1] != 1 and x.stride(0) != x.shape[1] * x.stride(1) for x in tensors
    ):
        return tensors
    return tuple(x.view(1, x.shape[0] * x.shape[1], x.shape[2]) for x in tensors)


def forward(x, weight, bias, count, samples):
    out = x.new_empty((*x.shape[:2], len(weight)))
    forward_into(out, x, weight, bias, False, count, samples)
    return out


def forward_into(out, x, weight, bias, accumulate, count, samples):
    refuse_float64(out=out, x=x, weight=weight, bias=bias)
    out, x = joined(count, out, x)
    (batch, seqlen, in_features), out_features = x.shape, len(weight)
    converted = x.dtype != weight.dtype
    described, stored = not converted and describable(x, by_rows(weight)), describable(out)
    busy = converted or in_features % WARPGROUPS[0].inner != 0 or (described and not stored)
    sizes = seqlen, out_features, in_features, batch
    tile = configure("forward", *sizes, processors(), x, weight, described, busy)
    x_tiles = weight_tiles = out_tiles = None
    transposed = weight.stride(1) != 1
    if tile.described:
        sides = (tile.inner, tile.columns) if transposed else (tile.columns, tile.inner)
        x_tiles = describe(x, 1, tile.rows, tile.inner)
        weight_tiles = describe(by_rows(weight), *sides)
        out_tiles = describe(out, 1, tile.rows, tile.columns) if stored else None
    tiles = batch * cdiv(seqlen, tile.rows) * cdiv(out_features, tile.columns)
    linear_kernel[(min(tiles, processors() * tile.programs),)](
        x, weight, bias, count, samples, out, x_tiles, weight_tiles, out_tiles,
        batch, seqlen, in_features, out_features,
        x.stride(), weight.stride(), *strides(bias, 1), out.stride(),
        ACCUMULATE=accumulate, EVEN_K=in_features % tile.inner == 0, TRANSPOSED=transposed,
        **launch_options(tile, "BLOCK_M", "BLOCK_N", "BLOCK_K"),
    )  # fmt: skip


def weight_gradient_into(grad, dout, x, bias_grad, written, count, samples):
    refuse_float64(grad=grad, dout=dout, x=x, bias_grad=bias_grad)
    if dout.numel() == 0:
        return
    dout, x = joined(count, dout, x)
    (batch, seqlen, in_features), out_features = x.shape, dout.shape[2]
    rows, columns, *_ = WARPGROUPS[0]
    busy = bias_grad is not None or out_features % rows != 0 or in_features % columns != 0
    sizes, described = (out_features, in_features, batch * seqlen, 1), describable(dout, x)
    tile = configure("weight_gradient", *sizes, 0, dout, x, described, busy)
    tiles = cdiv(out_features, tile.rows) * cdiv(in_features, tile.columns)
    steps = batch * cdiv(seqlen, tile.inner)
    segments = max(1, min(processors() * tile.programs // tiles, steps // SHORTEST))
    targets = [grad, bias_grad]
    if segments == 1:
        sums, before = [None if t is None else t.unsqueeze(0) for t in targets], written
    else:
        sums, before = [parts_of(t, segments) for t in targets], None
    dout_tiles = x_tiles = None
    if tile.described:
        dout_tiles = describe(dout, 1, tile.inner, tile.rows)
        x_tiles = describe(x, 1, tile.inner, tile.columns)
    weight_gradient_kernel[(tiles, segments)](
        dout, x, count, samples, before, *sums, dout_tiles, x_tiles,
        batch, seqlen, in_features, out_features, dout.stride(), x.stride(),
        *map(strides, sums, (3, 2)),
        EVEN=out_features % tile.rows == 0 and in_features % tile.columns == 0,
        EVEN_T=seqlen % tile.inner == 0, **launch_options(tile, "BLOCK_N", "BLOCK_K", "BLOCK_T"),
    )  # fmt: skip
    if segments > 1:
        for target, parts in zip(targets, sums, strict=True):
            if target is not None:
                add_up(parts, target, written, count)


def parts_of(target: Tensor | None, segments: int) -> Tensor | None:
    """Memory for what each segment adds to it."""
    if target is None:
        return None
    return target.new_empty((segments, *target.shape), dtype=torch.float32)


def add_up(parts: Tensor, target: Tensor, written: Tensor | None, count: Tensor | None) -> None:
    size, columns = target.numel(), target.shape[-1] if target.ndim == 2 else 1
    stride = target.stride() if target.ndim == 2 else (target.stride(0), 0)
    sum_kernel[(cdiv(size, SUMMED),)](
        parts, count, written, target, len(parts), size, columns, stride, BLOCK=SUMMED
    )
