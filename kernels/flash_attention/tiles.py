"""What the Triton kernels share: where a sequence lies, which keys a query sees, and its scores.

A row of tokens may hold several sequences. Then pointers say where that of each token begins and
ends, relative to the row; one of them is None where the window keeps to that side already.
"""

import triton
import triton.language as tl

from ..exponentials import in_base_2


@triton.jit
def span(cu_seqlens_ptr, sample, seqlen):
    """The first row of a sample's sequence, int64, and its length; a dense one begins at row 0."""
    first = sample * 0
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + sample)
        seqlen = tl.load(cu_seqlens_ptr + sample + 1) - start
        first += start
    return first, seqlen


@triton.jit
def tiles_of(
    ptr, stride, sample, row, head, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    OFFSET: tl.constexpr, UNIT: tl.constexpr, descriptor=None,
):  # fmt: skip
    """The tiles [BLOCK, BLOCK_D] of a head's sequence, which begins at `row`.

    stride: (batch, seqlen, heads) in UNIT numbers, and head_dim. descriptor: of the tensor, whose
    row is 0; or None.
    Returns where the sequence begins, the offsets within a tile, and the stride from row to row;
    the first two are kept apart, as an offset then takes one register. Or the descriptor, and the
    sample and the head to ask it for.
    """
    if descriptor is not None:
        tiles = descriptor, sample.to(tl.int32), head
    else:
        # A stride may fit into 32 bits that does not in single numbers
        in_row = tl.cast(stride[1], OFFSET) * UNIT
        start = ptr + sample * stride[0] * UNIT + tl.cast(row, tl.int64) * in_row
        start += tl.cast(head, tl.int64) * stride[2] * UNIT
        t, d = tl.arange(0, BLOCK).to(OFFSET), tl.arange(0, BLOCK_D).to(OFFSET)
        tiles = start, t[:, None] * in_row + d[None, :] * stride[3], in_row
    return tiles


@triton.jit
def tile_at(tiles, first, seqlen, HEAD_DIM: tl.constexpr):
    """Pointers to the tile whose first row is `first`, and which of its elements are there."""
    start, offsets, stride = tiles
    there = (first + tl.arange(0, offsets.shape[0]) < seqlen)[:, None]
    if offsets.shape[1] != HEAD_DIM:
        there = there & (tl.arange(0, offsets.shape[1]) < HEAD_DIM)[None, :]
    return start + tl.cast(first, tl.int64) * stride + offsets, there


@triton.jit
def load_tile(tiles, first, seqlen, HEAD_DIM: tl.constexpr, EDGE: tl.constexpr):
    """A tile, with zeros where nothing is. Unless EDGE, all its rows are there."""
    if isinstance(tiles[0], tl.tensor_descriptor):
        tile = tiles[0].load([tiles[1], first, tiles[2], 0])
        tile = tile.reshape(tile.shape[1], tile.shape[3])
    else:
        ptrs, there = tile_at(tiles, first, seqlen, HEAD_DIM)
        if EDGE:
            tile = tl.load(ptrs, mask=there, other=0.0)
        elif ptrs.shape[1] != HEAD_DIM:
            tile = tl.load(ptrs, mask=(tl.arange(0, ptrs.shape[1]) < HEAD_DIM)[None, :], other=0.0)
        else:
            tile = tl.load(ptrs)
    return tile


@triton.jit
def store_tile(tiles, first, seqlen, tile, HEAD_DIM: tl.constexpr):
    ptrs, there = tile_at(tiles, first, seqlen, HEAD_DIM)
    tl.store(ptrs, tile.to(ptrs.dtype.scalar.element_ty), mask=there)


@triton.jit
def key_range(first, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys that BLOCK_M queries from `first` on see, in whole tiles but for the last.

    window: (shift, seqlen_k, left, right): query i stands at key i + shift, and sees `left` keys to
    its left and `right` to its right; None is all.
    Returns start, inner_start, inner_stop, stop: tiles within the inner part need no mask.
    """
    shift, seqlen_k, left, right = window
    start = first * 0
    inner_start = start
    stop = seqlen_k
    inner_stop = seqlen_k // BLOCK_N * BLOCK_N
    if left is not None:
        start = tl.maximum(first + shift - left, 0) // BLOCK_N * BLOCK_N
        inner_start = tl.maximum(first + BLOCK_M - 1 + shift - left, 0)
        inner_start = tl.cdiv(inner_start, BLOCK_N) * BLOCK_N
    if right is not None:
        stop = tl.minimum(stop, tl.maximum(first + BLOCK_M + shift + right, 0))
        inner_stop = tl.minimum(inner_stop, tl.maximum(first + shift + right + 1, 0))
        inner_stop = inner_stop // BLOCK_N * BLOCK_N
    return start, tl.minimum(inner_start, stop), inner_stop, stop


@triton.jit
def narrow_keys(
    start, inner_start, inner_stop, stop, begins_ptr, ends_ptr, first, last, BLOCK_N: tl.constexpr
):  # fmt: skip
    """That range without what is in no sequence of the queries from `first` to `last`."""
    if begins_ptr is not None:
        start = tl.maximum(start, tl.load(begins_ptr + first) // BLOCK_N * BLOCK_N)
        whole = tl.cdiv(tl.load(begins_ptr + last), BLOCK_N) * BLOCK_N
        inner_start = tl.maximum(inner_start, whole)
    if ends_ptr is not None:
        stop = tl.minimum(stop, tl.load(ends_ptr + last))
        inner_stop = tl.minimum(inner_stop, tl.load(ends_ptr + first) // BLOCK_N * BLOCK_N)
    return start, tl.minimum(inner_start, stop), inner_stop, stop


@triton.jit
def part_of(start, inner_start, inner_stop, stop, part, parts, BLOCK_N: tl.constexpr):
    """A part of that range, in whole tiles, of `parts` parts alike; the last ones may be empty, and
    then stop before they start."""
    share = tl.cdiv(tl.cdiv(stop - start, BLOCK_N), parts) * BLOCK_N
    start += part * share
    stop = tl.minimum(stop, start + share)
    inner_start = tl.minimum(tl.maximum(inner_start, start), stop)
    return start, inner_start, tl.minimum(tl.maximum(inner_stop, start), stop), stop


@triton.jit
def query_range(first, seqlen_q, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Start and stop of the queries that see any of BLOCK_N keys from `first` on, likewise."""
    shift, _, left, right = window
    start = first * 0
    stop = seqlen_q
    if right is not None:
        start = tl.maximum(first - shift - right, 0) // BLOCK_M * BLOCK_M
    if left is not None:
        stop = tl.minimum(stop, tl.maximum(first + BLOCK_N - shift + left, 0))
    return start, stop


@triton.jit
def narrow_queries(start, stop, begins_ptr, ends_ptr, first, last, BLOCK_M: tl.constexpr):
    """That range without what is in no sequence of the keys from `first` to `last`."""
    if begins_ptr is not None:
        start = tl.maximum(start, tl.load(begins_ptr + first) // BLOCK_M * BLOCK_M)
    if ends_ptr is not None:
        stop = tl.minimum(stop, tl.load(ends_ptr + last))
    return start, stop


@triton.jit
def visible(i, j, window):
    """Whether query i sees key j; i and j are a column and a row, or a row and a column."""
    shift, seqlen_k, left, right = window
    seen = j < seqlen_k
    if left is not None:
        seen = seen & (j >= i + shift - left)
    if right is not None:
        seen = seen & (j <= i + shift + right)
    return seen


@triton.jit
def together(seen, walked, sequence):
    """`seen`, where walked tokens, a row, are also in the sequences of those that are held.

    sequence: where that of each token held begins and ends, columns; or None.
    """
    begins, ends = sequence
    if begins is not None:
        seen = seen & (walked >= begins)
    if ends is not None:
        seen = seen & (walked < ends)
    return seen


@triton.jit
def tanh(x):
    """To 3e-7 of itself: near 0, where 1 - 2 / (1 + e²ˣ) cancels, by its Taylor series."""
    square = x * x
    series = square * 0.021869488536155203 - 0.05396825396825397
    series = (series * square + 0.13333333333333333) * square - 0.3333333333333333
    whole = 1 - 2 / (1 + tl.exp2(x * 2.8853900817779268))  # e²ˣ
    return tl.where(square < 0.0625, x + x * square * series, whole)


@triton.jit
def scores_of(products, i, j, window, scoring):
    """The scores of q · k, in units of log 2; and, under a cap, their hyperbolic tangents.

    scoring: (scale, softcap, slope); no softcap and no slope of ALiBi are None.
    """
    scale, softcap, slope = scoring
    capped = products
    if softcap is not None:
        capped = tanh(products * (scale / softcap))
        scores = capped * in_base_2(softcap)
    else:
        scores = products * in_base_2(scale)
    if slope is not None:
        scores -= tl.abs(i + window[0] - j).to(tl.float32) * in_base_2(slope)
    return scores, capped


@triton.jit
def slope_of(slopes_ptr, stride, sample, head):
    """ALiBi's slope of a head. stride: (batch, heads)."""
    return tl.load(slopes_ptr + sample * stride[0] + head * stride[1]).to(tl.float32)


@triton.jit
def dropped(weights, i, j, dropout):
    """The weights after dropout. Query, key, head and sample are Philox's counter.

    dropout: (seed, how many of 2³² words drop a weight, the factor on the others, sample, head).
    """
    seed, threshold, keep_scale, sample, head = dropout
    zeros = i * 0 + j * 0
    words, _, _, _ = tl.philox(seed, zeros + j, zeros + i, zeros + head, zeros + sample)
    return tl.where(words >= threshold, weights * keep_scale, 0.0)
