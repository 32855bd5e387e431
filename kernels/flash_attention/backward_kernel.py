"""The two passes of the backward: dq over the keys, dk and dv over the queries."""

import triton
import triton.language as tl

from ..dot import dot
from ..exponentials import in_base_2
from ..routing.gate import active_sample, routed_jit
from .tiles import (
    dropped,
    key_range,
    load_tile,
    narrow_keys,
    narrow_queries,
    query_range,
    scores_of,
    slope_of,
    span,
    store_tile,
    tiles_of,
    together,
    visible,
)


@triton.jit
def rebuild(
    products, dweights, lse, delta, i, j, walked, sequence, window, scoring, dropout,
    EDGE: tl.constexpr,
):  # fmt: skip
    """The weights as they met V, and the gradient of q · k over `scale`, from q · k and dO · v.

    i, lse and delta are a column and j a row, or the other way round; walked is the row. lse is in
    units of log 2. Unless EDGE, every query sees all keys.
    """
    scores, capped = scores_of(products, i, j, window, scoring)
    weights = tl.exp2(scores - lse)
    if EDGE:  # no sooner, as registers are scarce
        seen = together(visible(i, j, window), walked, sequence)
        weights = tl.where(seen, weights, 0.0)
    used = weights
    if dropout[0] is not None:
        used, dweights = dropped(weights, i, j, dropout), dropped(dweights, i, j, dropout)
    dproducts = weights * (dweights - delta)
    if scoring[1] is not None:
        dproducts *= 1 - capped * capped
    return used, dproducts


@triton.jit
def gather_dq(
    dq, q, dout, lse, delta, keys, values, start, stop, i, sequence, window, scoring, dropout,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds to dq what keys from start to stop give. Unless EDGE, every query sees all of them."""
    for n in tl.range(start, stop, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        # [BLOCK_N, BLOCK_D]
        k = load_tile(keys, n, window[1], HEAD_DIM, EDGE)
        v = load_tile(values, n, window[1], HEAD_DIM, EDGE)
        # [BLOCK_M, BLOCK_N]
        products, dweights = dot(q, tl.trans(k)), dot(dout, tl.trans(v))
        _, dproducts = rebuild(
            products, dweights, lse[:, None], delta[:, None], i[:, None], j[None, :], j[None, :],
            sequence, window, scoring, dropout, EDGE,
        )  # fmt: skip
        dq = dot(dproducts.to(k.dtype), k, dq)
    return dq


@routed_jit("seqlen_q", "seqlen_k", "left", "right", "threshold")
def dq_kernel(
    dout_ptr, dlse_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, slopes_ptr, seed_ptr,
    cu_q_ptr, cu_k_ptr, begins_ptr, ends_ptr, count_ptr, samples_ptr, dq_ptr, base_ptr, delta_ptr,
    k_tiles, v_tiles,
    seqlen_q, seqlen_k, group, left, right, scale, softcap, threshold: tl.uint32, keep_scale,
    stride_dout, stride_dlse, stride_q, stride_k, stride_v, stride_slopes, stride_out, stride_lse,
    stride_dq, stride_delta,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OFFSET: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries; and their lse in units of log 2 and their Δ, for dkdv_kernel.

    stride_*: as in forward_kernel. base, delta: like lse, with stride_delta.
    """
    sample = active_sample(count_ptr, samples_ptr, tl.program_id(2))
    if sample < 0:
        return
    head = tl.program_id(0)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
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
    douts = tiles_of(dout_ptr, stride_dout, sample, row_q, head, BLOCK_M, BLOCK_D, OFFSET, UNIT)
    outs = tiles_of(out_ptr, stride_out, sample, row_q, head, BLOCK_M, BLOCK_D, OFFSET, UNIT)
    dqs = tiles_of(dq_ptr, stride_dq, sample, row_q, head, BLOCK_M, BLOCK_D, OFFSET, UNIT)
    keys = tiles_of(
        k_ptr, stride_k, sample, row_k, head // group, BLOCK_N, BLOCK_D, OFFSET, UNIT, k_tiles
    )
    values = tiles_of(
        v_ptr, stride_v, sample, row_k, head // group, BLOCK_N, BLOCK_D, OFFSET, UNIT, v_tiles
    )
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
    out = load_tile(outs, first, seqlen_q, HEAD_DIM, True)
    dout = load_tile(douts, first, seqlen_q, HEAD_DIM, True)
    q = load_tile(queries, first, seqlen_q, HEAD_DIM, True)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # [BLOCK_M]
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    head_64 = tl.cast(head, tl.int64)
    if dlse_ptr is not None:
        place = sample * stride_dlse[0] + head_64 * stride_dlse[1] + (row_q + i) * stride_dlse[2]
        delta -= tl.load(dlse_ptr + place, mask=i < seqlen_q, other=0.0)
    place = sample * stride_lse[0] + head_64 * stride_lse[1] + row_q + i
    lse = in_base_2(tl.load(lse_ptr + place, mask=i < seqlen_q, other=0.0))
    place = sample * stride_delta[0] + head_64 * stride_delta[1] + row_q + i
    tl.store(base_ptr + place, lse, mask=i < seqlen_q)
    tl.store(delta_ptr + place, delta, mask=i < seqlen_q)
    start, inner_start, inner_stop, stop = key_range(first, window, BLOCK_M, BLOCK_N)
    start, inner_start, inner_stop, stop = narrow_keys(
        start, inner_start, inner_stop, stop, begins_ptr, ends_ptr,
        first, tl.minimum(first + BLOCK_M, seqlen_q) - 1, BLOCK_N,
    )  # fmt: skip
    if left is not None or begins_ptr is not None:
        dq = gather_dq(
            dq, q, dout, lse, delta, keys, values, start, inner_start, i, sequence, window,
            scoring, dropout, HEAD_DIM, BLOCK_N, True,
        )  # fmt: skip
    dq = gather_dq(
        dq, q, dout, lse, delta, keys, values, inner_start, inner_stop, i, sequence, window,
        scoring, dropout, HEAD_DIM, BLOCK_N, False,
    )  # fmt: skip
    dq = gather_dq(
        dq, q, dout, lse, delta, keys, values, tl.maximum(inner_start, inner_stop), stop, i,
        sequence, window, scoring, dropout, HEAD_DIM, BLOCK_N, True,
    )  # fmt: skip
    store_tile(dqs, first, seqlen_q, dq * scale, HEAD_DIM)


@triton.jit
def gather_dkdv(
    dk, dv, k, v, queries, douts, base_ptr, delta_ptr, start, stop, j, sequence, seqlen_q,
    window, scoring, dropout, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Adds to dk and dv what the queries from start to stop give.

    The products are taken as k qᵀ, so that no accumulator is transposed on its way into the next.
    All tiles are masked: a second loop for those that need none takes more registers than there
    are, the mask a tenth of the instructions.
    """
    for m in tl.range(start, stop, BLOCK_M):
        i = m + tl.arange(0, BLOCK_M)
        # [BLOCK_M, BLOCK_D]
        q = load_tile(queries, m, seqlen_q, HEAD_DIM, True)
        dout = load_tile(douts, m, seqlen_q, HEAD_DIM, True)
        # [BLOCK_M], with weights of zero for queries past the last
        lse = tl.load(base_ptr + i, mask=i < seqlen_q, other=float("inf"))
        # [BLOCK_N, BLOCK_M]
        products, dweights = dot(k, tl.trans(q)), dot(v, tl.trans(dout))
        # [BLOCK_M], loaded late, as registers are scarce while the products run
        delta = tl.load(delta_ptr + i, mask=i < seqlen_q, other=0.0)
        weights, dproducts = rebuild(
            products, dweights, lse[None, :], delta[None, :], i[None, :], j[:, None], i[None, :],
            sequence, window, scoring, dropout, True,
        )  # fmt: skip
        dv = dot(weights.to(dout.dtype), dout, dv)
        dk = dot(dproducts.to(q.dtype), q, dk)
    return dk, dv


@routed_jit("seqlen_q", "seqlen_k", "left", "right", "threshold")
def dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, base_ptr, delta_ptr, slopes_ptr, seed_ptr,
    cu_q_ptr, cu_k_ptr, begins_ptr, ends_ptr, count_ptr, samples_ptr, dk_ptr, dv_ptr,
    q_tiles, dout_tiles,
    seqlen_q, seqlen_k, group, left, right, scale, softcap, threshold: tl.uint32, keep_scale,
    stride_dout, stride_q, stride_k, stride_v, stride_slopes, stride_delta, stride_dk,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OFFSET: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys, summed over the heads of its group, one after the other.

    The first tile, which most queries see where attention is causal, goes first.
    """
    sample = active_sample(count_ptr, samples_ptr, tl.program_id(2))
    if sample < 0:
        return
    kv_head = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_N
    row_q, seqlen_q = span(cu_q_ptr, sample, seqlen_q)
    row_k, seqlen_k = span(cu_k_ptr, sample, seqlen_k)
    if first >= seqlen_k:
        return
    window = (seqlen_k - seqlen_q, seqlen_k, left, right)
    keys = tiles_of(k_ptr, stride_k, sample, row_k, kv_head, BLOCK_N, BLOCK_D, OFFSET, UNIT)
    values = tiles_of(v_ptr, stride_v, sample, row_k, kv_head, BLOCK_N, BLOCK_D, OFFSET, UNIT)
    dks = tiles_of(dk_ptr, stride_dk, sample, row_k, kv_head, BLOCK_N, BLOCK_D, OFFSET, UNIT)
    dvs = tiles_of(dv_ptr, stride_dk, sample, row_k, kv_head, BLOCK_N, BLOCK_D, OFFSET, UNIT)
    j = first + tl.arange(0, BLOCK_N)
    begins, ends = begins_ptr, ends_ptr
    if begins_ptr is not None:
        begins_ptr += sample * seqlen_k
        begins = tl.load(begins_ptr + j, mask=j < seqlen_k, other=0)[:, None]
    if ends_ptr is not None:
        ends_ptr += sample * seqlen_k
        ends = tl.load(ends_ptr + j, mask=j < seqlen_k, other=0)[:, None]
    sequence = (begins, ends)

    # [BLOCK_N, BLOCK_D]
    k = load_tile(keys, first, seqlen_k, HEAD_DIM, True)
    v = load_tile(values, first, seqlen_k, HEAD_DIM, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    start, stop = query_range(first, seqlen_q, window, BLOCK_M, BLOCK_N)
    start, stop = narrow_queries(
        start, stop, begins_ptr, ends_ptr, first, tl.minimum(first + BLOCK_N, seqlen_k) - 1, BLOCK_M
    )
    for member in range(group):
        head = kv_head * group + member
        slope, seed = slopes_ptr, seed_ptr  # None where there is none; no function may return that
        if slopes_ptr is not None:
            slope = slope_of(slopes_ptr, stride_slopes, sample, head)
        if seed_ptr is not None:
            seed = tl.load(seed_ptr)
        scoring = (scale, softcap, slope)
        dropout = (seed, threshold, keep_scale, sample.to(tl.int32), head)
        queries = tiles_of(
            q_ptr, stride_q, sample, row_q, head, BLOCK_M, BLOCK_D, OFFSET, UNIT, q_tiles
        )
        douts = tiles_of(
            dout_ptr, stride_dout, sample, row_q, head, BLOCK_M, BLOCK_D, OFFSET, UNIT, dout_tiles
        )
        place = sample * stride_delta[0] + tl.cast(head, tl.int64) * stride_delta[1] + row_q
        dk, dv = gather_dkdv(
            dk, dv, k, v, queries, douts, base_ptr + place, delta_ptr + place, start, stop, j,
            sequence, seqlen_q, window, scoring, dropout, HEAD_DIM, BLOCK_M,
        )  # fmt: skip
    store_tile(dks, first, seqlen_k, dk * scale, HEAD_DIM)
    store_tile(dvs, first, seqlen_k, dv, HEAD_DIM)
