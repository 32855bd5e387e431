"""The forward pass: online softmax over tiles of keys, or, where queries are few, parts of them."""

import triton
import triton.language as tl

from ..dot import dot
from ..exponentials import in_base_2, in_base_e
from ..routing.gate import active_sample, routed_jit
from .tiles import (
    dropped,
    key_range,
    load_tile,
    narrow_keys,
    part_of,
    scores_of,
    slope_of,
    span,
    store_tile,
    tiles_of,
    together,
    visible,
)


@triton.jit
def attend(
    acc, total, top, q, keys, values, start, stop, i, sequence, window, scoring, dropout,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds the keys from start to stop to acc, total and top. Unless EDGE, every query sees all."""
    for n in tl.range(start, stop, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        k = load_tile(keys, n, window[1], HEAD_DIM, EDGE)  # [BLOCK_N, BLOCK_D]
        products = dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        if not EDGE and scoring[1] is None and scoring[2] is None:
            # Scaled on the way into exp2, where it costs nothing
            scale = in_base_2(scoring[0])
            higher = tl.maximum(top, tl.max(products, 1) * scale)
            base = higher
            weights = tl.exp2(products * scale - base[:, None])
        else:
            scores, _ = scores_of(products, i[:, None], j[None, :], window, scoring)
            if EDGE:
                seen = visible(i[:, None], j[None, :], window)
                seen = together(seen, j[None, :], sequence)
                scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            base = higher
            if EDGE:  # a query that has seen no key yet has no finite score to subtract
                base = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weights, 1)
        top = higher
        if dropout[0] is not None:
            weights = dropped(weights, i[:, None], j[None, :], dropout)
        v = load_tile(values, n, window[1], HEAD_DIM, EDGE)  # [BLOCK_N, BLOCK_D]
        acc = dot(weights.to(v.dtype), v, acc * decay[:, None])
    return acc, total, top


@routed_jit("seqlen_q", "seqlen_k", "left", "right", "threshold", "parts")
def forward_kernel(
    q_ptr, k_ptr, v_ptr, slopes_ptr, seed_ptr, cu_q_ptr, cu_k_ptr, begins_ptr, ends_ptr,
    count_ptr, samples_ptr, out_ptr, lse_ptr, k_tiles, v_tiles,
    seqlen_q, seqlen_k, group, left, right, scale, softcap, threshold: tl.uint32, keep_scale, parts,
    stride_q, stride_k, stride_v, stride_slopes, stride_out, stride_lse, stride_parts,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OFFSET: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head of one active sample; the last tile, the longest, goes first.

    scale: not negative, so that the largest product has the largest score.
    begins, ends: (batch, seqlen), of the sequences in a row of tokens; None where the window says.
    parts: None; or how many programs share out the keys of one tile, which holds all queries. Each
    writes what its keys alone would give, to its part of out and lse, which lie stride_parts apart.
    stride_*: (batch, seqlen, heads) in UNIT numbers, and head_dim; of slopes (batch, heads), of lse
    (batch, heads, seqlen).
    """
    sample = active_sample(count_ptr, samples_ptr, tl.program_id(2))
    if sample < 0:
        return
    head = tl.program_id(0)
    part = tl.program_id(1)
    first = (tl.num_programs(1) - 1 - part) * BLOCK_M
    if parts is not None:
        first = part * 0
        out_ptr += tl.cast(part, tl.int64) * stride_parts[0]
        lse_ptr += tl.cast(part, tl.int64) * stride_parts[1]
    row_q, seqlen_q = span(cu_q_ptr, sample, seqlen_q)
    row_k, seqlen_k = span(cu_k_ptr, sample, seqlen_k)
    if first >= seqlen_q:
        return
    window = (seqlen_k - seqlen_q, seqlen_k, left, right)
    slope, seed = slopes_ptr, seed_ptr  # None where there is none; no function may return that
    if slopes_ptr is not None:
        slope = slope_of(slopes_ptr, stride_slopes, sample, head)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    scoring = (scale, softcap, slope)
    dropout = (seed, threshold, keep_scale, sample.to(tl.int32), head)
    queries = tiles_of(q_ptr, stride_q, sample, row_q, head, BLOCK_M, BLOCK_D, OFFSET, UNIT)
    keys = tiles_of(
        k_ptr, stride_k, sample, row_k, head // group, BLOCK_N, BLOCK_D, OFFSET, UNIT, k_tiles
    )
    values = tiles_of(
        v_ptr, stride_v, sample, row_k, head // group, BLOCK_N, BLOCK_D, OFFSET, UNIT, v_tiles
    )
    outs = tiles_of(out_ptr, stride_out, sample, row_q, head, BLOCK_M, BLOCK_D, OFFSET, UNIT)
    i = first + tl.arange(0, BLOCK_M)
    begins, ends = begins_ptr, ends_ptr
    if begins_ptr is not None:
        begins_ptr += sample * seqlen_q
        begins = tl.load(begins_ptr + i, mask=i < seqlen_q, other=0)[:, None]
    if ends_ptr is not None:
        ends_ptr += sample * seqlen_q
        ends = tl.load(ends_ptr + i, mask=i < seqlen_q, other=0)[:, None]
    sequence = (begins, ends)

    # [BLOCK_M, BLOCK_D]
    q = load_tile(queries, first, seqlen_q, HEAD_DIM, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # [BLOCK_M]
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    start, inner_start, inner_stop, stop = key_range(first, window, BLOCK_M, BLOCK_N)
    start, inner_start, inner_stop, stop = narrow_keys(
        start, inner_start, inner_stop, stop, begins_ptr, ends_ptr,
        first, tl.minimum(first + BLOCK_M, seqlen_q) - 1, BLOCK_N,
    )  # fmt: skip
    if parts is not None:
        start, inner_start, inner_stop, stop = part_of(
            start, inner_start, inner_stop, stop, part, parts, BLOCK_N
        )
    if left is not None or begins_ptr is not None:
        acc, total, top = attend(
            acc, total, top, q, keys, values, start, inner_start, i, sequence, window, scoring,
            dropout, HEAD_DIM, BLOCK_N, True,
        )  # fmt: skip
    acc, total, top = attend(
        acc, total, top, q, keys, values, inner_start, inner_stop, i, sequence, window, scoring,
        dropout, HEAD_DIM, BLOCK_N, False,
    )  # fmt: skip
    acc, total, top = attend(
        acc, total, top, q, keys, values, tl.maximum(inner_start, inner_stop), stop, i,
        sequence, window, scoring, dropout, HEAD_DIM, BLOCK_N, True,
    )  # fmt: skip

    blind = total == 0
    total = tl.where(blind, 1.0, total)
    store_tile(outs, first, seqlen_q, acc / total[:, None], HEAD_DIM)
    lse = tl.where(blind, float("-inf"), in_base_e(top + tl.log2(total)))
    lse_ptr += sample * stride_lse[0] + tl.cast(head, tl.int64) * stride_lse[1] + row_q
    tl.store(lse_ptr + i, lse, mask=i < seqlen_q)


@routed_jit("seqlen_q", "parts")
def join_kernel(
    outs_ptr, lses_ptr, cu_q_ptr, count_ptr, samples_ptr, out_ptr, lse_ptr,
    seqlen_q, parts, stride_outs, stride_lses, stride_parts, stride_out, stride_lse,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One query of one head of one active sample: what its parts give, weighted by their sums.

    stride_outs, stride_lses: within a part, as stride_out and stride_lse in `forward_kernel`.
    """
    sample = active_sample(count_ptr, samples_ptr, tl.program_id(2))
    if sample < 0:
        return
    head, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, seqlen_q = span(cu_q_ptr, sample, seqlen_q)
    if i >= seqlen_q:
        return
    row += i
    part, d = tl.arange(0, PARTS).to(tl.int64), tl.arange(0, BLOCK_D).to(tl.int64)
    inside = d < HEAD_DIM
    # [PARTS]
    lses_ptr += sample * stride_lses[0] + head * stride_lses[1] + row * stride_lses[2]
    lses = tl.load(lses_ptr + part * stride_parts[1], mask=part < parts, other=float("-inf"))
    top = tl.max(lses, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(in_base_2(lses - base))
    total = tl.sum(weights, 0)
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    # [PARTS, BLOCK_D]
    outs_ptr += sample * stride_outs[0] + row * stride_outs[1] + head * stride_outs[2]
    ptrs = outs_ptr + part[:, None] * stride_parts[0] + d[None, :] * stride_outs[3]
    there = (part < parts)[:, None] & inside[None, :]
    outs = tl.load(ptrs, mask=there, other=0.0)
    # [BLOCK_D]
    out = tl.sum(weights[:, None] * outs, 0) / total
    out_ptr += sample * stride_out[0] + row * stride_out[1] + head * stride_out[2]
    tl.store(out_ptr + d * stride_out[3], out.to(out_ptr.dtype.element_ty), mask=inside)
    lse = tl.where(blind, float("-inf"), base + in_base_e(tl.log2(total)))
    tl.store(lse_ptr + sample * stride_lse[0] + head * stride_lse[1] + row * stride_lse[2], lse)
