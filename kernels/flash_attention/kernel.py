"""Triton kernels and launchers.

A program holds a tile of queries and goes through the keys that its queries see. The scores of a
tile live in registers, and the softmax is built up as it goes: a running maximum and sum per query.
Tiles of keys that no query of the tile sees are skipped, those that all of them see are not masked,
and where attention is causal the longest programs start first. On Hopper descriptors load keys and
values of 16 bits, unless sequences are packed by cu_seqlens: there a tile has to end with its own.

Sequences may also lie in rows of one length. Then the bounds of a token say where its own sequence
begins and ends, and the launch is the same however many there are.

The backward pass has two kernels and no atomics. The first holds queries, and writes dQ and
Δ = Σ dO O − dL; the second holds keys, goes through the queries and the heads of the group, and
writes dK and dV. It takes 7 products of tiles where 5 would do, and always gives the same bits.

Where queries are few, as in decoding, so are programs, and each would walk long keys alone. There
more of them share out the keys, write what each part gives by itself, and a second kernel joins the
parts (Dao et al. 2023, "Flash-Decoding for long-context inference").

Dropout leaves no mask behind: one word of Philox4x32-10 says for each weight whether it is kept, in
all implementations the same one, and the backward pass draws it anew.

Floor, per query and key that it sees, head dim D, on Hopper (per SM and cycle: 4096 dense 16-bit
FLOPs, 16 MUFU, 128 lanes of the other pipes):

    forward    4 D FLOPs: at D = 128, 512 / 4096 = 0.125 cycles. One exp2: 1 / 16 = 0.063. About 7
               instructions (scale, maximum, subtract, sum, convert): 7 / 128 = 0.055.
    backward   14 D FLOPs, two exp2, and about 2 · 9 instructions: 0.44, 0.125 and 0.14 cycles.

Matrix FLOPs bind where D >= 64, if the softmax of one tile overlaps the products of another; at
D = 64 the forward's FLOPs and exp2 are equal, and below that exp2 binds. Bytes do not: a tile of
128 queries reads 4 D bytes of K and V for 512 D FLOPs. Of a single query they do: 4 D bytes for
4 D FLOPs of each head of the group. How near the kernels come: not measured.
"""

import math
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import configs
from ..descriptors import LEAST_ARCH, describable, describe, pay
from ..launch import PROGRAMS, cdiv, next_power_of_2, refuse_more_samples_than_programs, strides
from ..precision import refuse_float64
from ..target import arch, processors
from .backward_kernel import dkdv_kernel, dq_kernel
from .forward_kernel import forward_kernel, join_kernel

# Few queries are those of one tile of 16 rows. Their keys are shared out among programs, of which a
# multiprocessor gets two. Parts of the longest sequence have some 256 keys or more, and one program
# can join 64 of them.
FEW, RESIDENT, SHORTEST, MOST = 16, 2, 256, 64

# The tile that a program holds, the tile that it goes through, and the stages of the pipeline, by
# the head dim that fits. Found by compiling offline for sm_90 and sm_80: the largest that spill no
# register, where head dims are multiples of 8.
Tiles = dict[str, dict[int, tuple[int, int, int]]]
DESCRIBED: Tiles = {  # sm_90, sm_100: keys and values that descriptors load
    "forward": {64: (128, 128, 3), 128: (128, 128, 2), 256: (128, 32, 2)},
    "dq": {64: (128, 64, 3), 128: (128, 64, 3)},
}
WARPGROUPS: Tiles = {  # sm_90, sm_100: 227 KB of shared memory, products by warpgroups
    "forward": {64: (128, 128, 3), 128: (128, 64, 3), 256: (128, 32, 2)},
    "decode": {64: (16, 128, 3), 128: (16, 64, 3), 256: (16, 32, 3)},
    "dq": {64: (128, 64, 3), 128: (128, 64, 2), 256: (128, 32, 2)},
    "dkdv": {64: (128, 32, 2), 128: (128, 32, 2), 256: (32, 32, 2)},
}
WARPS: Tiles = {  # every other: 99 KB, products by warps
    "forward": {64: (128, 64, 3), 128: (128, 32, 3), 256: (64, 32, 2)},
    "decode": {64: (16, 64, 3), 128: (16, 64, 3), 256: (16, 32, 3)},
    "dq": {64: (64, 64, 2), 128: (64, 32, 2), 256: (32, 16, 2)},
    "dkdv": {64: (64, 32, 2), 128: (64, 32, 2), 256: (32, 16, 2)},
}
LANES: Tiles = {  # float32, whose products have no matrix unit
    "forward": {64: (32, 32, 2), 128: (32, 16, 2), 256: (16, 16, 2)},
    "decode": {64: (16, 32, 2), 128: (16, 32, 2), 256: (16, 16, 2)},
    "dq": {64: (32, 32, 2), 128: (32, 16, 2), 256: (16, 32, 2)},
    "dkdv": {64: (32, 32, 2), 128: (16, 32, 1), 256: (16, 16, 1)},
}


def configure(
    kernel: str, q: Tensor, queries: int, keys: int, sequences: int, window: tuple[int, int],
    packing: str, described: bool, busy: bool,
) -> dict[str, int]:  # fmt: skip
    """Tiles, warps and stages of a kernel: forward, the same for few queries, dq or dkdv.

    queries, keys: of the longest sequence. window: (left, right). packing: see `packing_of`.
    described: whether descriptors can load the tiles that it goes through; in the result, whether
    they do. busy: whether softcap, ALiBi or dropout need registers of their own.
    """
    heads, head_dim = q.shape[-2:]
    left, right = window
    described = described and arch() >= LEAST_ARCH
    facts = {
        "dtype": str(q.dtype), "head_dim": head_dim, "left": left >= 0, "right": right >= 0,
        "packing": packing, "described": described, "busy": busy,
    }  # fmt: skip
    sizes = {
        "queries": (queries, 16384),
        "keys": (keys if left < 0 else min(left + 1, keys), 16384),  # that a query sees
        "heads": (sequences * heads, 256),
    }
    described = described and pay(sequences * heads * head_dim * queries * keys)
    tiles = heuristic(kernel, head_dim, q.dtype, described, busy)
    chosen = configs.choose(f"flash_attention.{kernel}", facts, sizes, tiles)
    return {"BLOCK_D": max(16, next_power_of_2(head_dim)), **chosen}


def packing_of(cu_seqlens: Tensor | None, bounds: Tensor | None) -> str:
    """How sequences lie, of which the work depends that a shape leaves: one in a row, several, or
    one after the other."""
    if bounds is not None:
        return "rows"
    return "none" if cu_seqlens is None else "packed"


def heuristic(
    kernel: str, head_dim: int, dtype: torch.dtype, described: bool, busy: bool
) -> dict[str, int]:
    """What a kernel takes untuned."""
    warpgroups = dtype != torch.float32 and arch() in (90, 100)
    if dtype == torch.float32:
        tiles = LANES
    else:
        tiles = WARPGROUPS if warpgroups else WARPS
    if described and warpgroups and not busy and head_dim <= max(DESCRIBED.get(kernel, [0])):
        tiles = DESCRIBED
    held, walked, stages = next(t for limit, t in tiles[kernel].items() if head_dim <= limit)
    if (busy or (kernel == "dkdv" and arch() == 100)) and walked > 16:
        walked //= 2
    block_m, block_n = (walked, held) if kernel == "dkdv" else (held, walked)
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4 if kernel == "decode" else 8,
        "num_stages": stages, "described": int(tiles is DESCRIBED),
    }  # fmt: skip


def check(q: Tensor) -> None:
    refuse_float64(q=q)
    if q.shape[-1] > 256:
        raise ValueError(f"q must have a head_dim of at most 256 on a GPU, got {q.shape[-1]}")


def grid_of(heads: int, longest: int, block: int, sequences: int) -> tuple[int, int, int]:
    """A program for each head, tile of the longest sequence, and sequence. Heads come first, since
    programs that run together then share keys, or walk as many tiles."""
    grid = heads, cdiv(longest, block), sequences
    if longest > PROGRAMS * block:
        raise ValueError(
            f"a sequence must be at most {PROGRAMS * block} tokens for impl='triton' with this"
            f" dtype and head_dim, got {longest}; of packed ones, max_seqlen_q and max_seqlen_k"
            " say how long they are"
        )
    if math.prod(grid) >= 2**31:  # which Triton, counting in int32, takes for none
        raise ValueError(
            f"impl='triton' takes less than 2³¹ programs, got {heads} heads of {sequences}"
            f" sequences of up to {longest} tokens; of packed ones, max_seqlen_q and max_seqlen_k"
            " say how long they are"
        )
    return grid


def addressing(*tensors: Tensor) -> dict[str, Any]:
    """OFFSET, the integer that holds every offset within a tile, of up to 256 rows; and UNIT, the
    numbers in which strides are given.

    Of an argument Triton knows whether 16 divides it, and else nothing: that 8, 4 or 2 does, it is
    told by the unit, as rows would be loaded number by number without.
    """
    offset, unit = addresses(*(x.stride() for x in tensors))
    return {"OFFSET": offset, "UNIT": unit}


@lru_cache(maxsize=4096)
def addresses(*strides: tuple[int, ...]) -> tuple[tl.dtype, int]:
    reach = max(256 * of[-3] + 256 * of[-1] for of in strides)
    common = math.gcd(*(stride for of in strides for stride in of[:-1]))
    unit = common & -common or 16
    return tl.int32 if reach < 2**31 else tl.int64, unit if unit < 16 else 1


def in_units(tensor: Tensor, unit: int) -> tuple[int, ...]:
    if unit == 1:
        return strides(tensor, 4)
    *outer, last = strides(tensor, 4)
    return *(stride // unit for stride in outer), last


def descriptors(
    config: dict[str, int], block: str, *tensors: Tensor
) -> tuple[TensorDescriptor | None, ...]:
    """Of tensors (batch, seqlen, heads, head_dim), in tiles of one head, if the configuration wants
    them. block: the name of their rows in it."""
    if not config.pop("described"):
        return (None,) * len(tensors)
    return tuple(describe(x, 1, config[block], 1, config["BLOCK_D"]) for x in tensors)


def is_busy(softcap: float, alibi_slopes: Tensor | None, dropout_seed: Tensor | None) -> bool:
    return softcap != 0 or alibi_slopes is not None or dropout_seed is not None


def extents(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> tuple[int, int, int]:
    """How many sequences there are, and how long the queries and the keys of the longest are."""
    sequences = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    refuse_more_samples_than_programs(sequences)
    longest_q = q.shape[-3] if max_seqlen_q is None else max_seqlen_q
    return sequences, longest_q, k.shape[-3] if max_seqlen_k is None else max_seqlen_k


def sides_of(
    bounds: Tensor | None, *, queries: bool, causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Where the sequences of the tokens that a program holds begin and end, queries or keys; None
    where causal attention goes no further anyway."""
    if bounds is None:
        return None, None
    begins, ends = bounds.contiguous().unbind()
    return (None if causal and not queries else begins), (None if causal and queries else ends)


def shared_arguments(q, k, left, right, scale, softcap, dropout_p) -> tuple:
    """From seqlen_q to keep_scale, as all three kernels take them."""
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    group = q.shape[-2] // k.shape[-2]
    window = (None if left < 0 else left, None if right < 0 else right)
    return (
        q.shape[-3], k.shape[-3], group, *window, scale, softcap or None, threshold,
        1 / (1 - dropout_p),
    )  # fmt: skip


def forward(
    q, k, v, left, right, scale, softcap, alibi_slopes, dropout_p, dropout_seed,
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bounds, count, samples, into=None,
):  # fmt: skip
    """into: out and lse, the memory for them."""
    check(q)
    if scale < 0:  # exact, and so rare that the kernel need not know
        q, scale = -q, -scale
    *_, seqlen_q, heads, head_dim = q.shape
    out, lse = results = into or (
        q.new_empty(q.shape),
        q.new_empty((*q.shape[:-3], heads, seqlen_q), dtype=torch.float32),
    )
    busy = is_busy(softcap, alibi_slopes, dropout_seed)
    group_fits = seqlen_q == 1 and heads <= FEW * k.shape[-2]
    dense = cu_seqlens_q is None
    if dense and bounds is None and group_fits and not busy and lse.stride(1) == 1:
        q, k, v, out, lse = by_group(q, k, v, out, lse, left)
        left = right = -1
        *_, seqlen_q, heads, head_dim = q.shape
    sequences, longest_q, longest_k = extents(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    few = longest_q <= FEW
    packing = packing_of(cu_seqlens_q, bounds)
    shape = q, longest_q, longest_k, sequences, (left, right), packing
    described = dense and not few and describable(k, v)
    config = configure("decode" if few else "forward", *shape, described, busy)
    tiles = descriptors(config, "BLOCK_N", k, v)
    grid = grid_of(heads, longest_q, config["BLOCK_M"], sequences)
    seen = longest_k if left < 0 else min(longest_k, left + longest_q)
    parts = parts_of(heads * sequences, seen) if few else 1
    outs, lses, apart = out, lse, None
    if parts > 1:
        grid = heads, parts, sequences
        outs, lses = (x.new_empty((parts, *x.shape), dtype=torch.float32) for x in (out, lse))
        apart = outs.stride(0), lses.stride(0)
        outs, lses = outs[0], lses[0]
    where = addressing(q, k, v, outs)
    of_q, of_k, of_v, of_out = (in_units(x, where["UNIT"]) for x in (q, k, v, outs))
    forward_kernel[grid](
        q, k, v, alibi_slopes, dropout_seed, cu_seqlens_q, cu_seqlens_k,
        *sides_of(bounds, queries=True, causal=right == 0), count, samples, outs, lses, *tiles,
        *shared_arguments(q, k, left, right, scale, softcap, dropout_p),
        None if apart is None else parts, of_q, of_k, of_v, strides(alibi_slopes, 2), of_out,
        strides(lses, 3), apart,
        HEAD_DIM=head_dim, **where, **config,
    )  # fmt: skip
    if apart is not None:
        join_kernel[(heads, longest_q, sequences)](
            outs, lses, cu_seqlens_q, count, samples, out, lse,
            seqlen_q, parts, strides(outs, 4), strides(lses, 3), apart, strides(out, 4),
            strides(lse, 3),
            HEAD_DIM=head_dim, BLOCK_D=config["BLOCK_D"], PARTS=next_power_of_2(parts),
        )  # fmt: skip
    return results


def by_group(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, left: int
) -> tuple[Tensor, ...]:
    """The same for one query a sequence, which sees all keys up to the last: the heads of a group
    as queries of one head, so that they share what is loaded of its keys. Views of all."""
    kv_heads, seen = k.shape[2], slice(None if left < 0 else max(0, k.shape[1] - 1 - left), None)
    q, out = (x.squeeze(1).unflatten(1, (kv_heads, -1)).transpose(1, 2) for x in (q, out))
    return q, k[:, seen], v[:, seen], out, lse.squeeze(2).unflatten(1, (kv_heads, -1))


def parts_of(programs: int, keys: int) -> int:
    """Among how many programs to share out the keys of each of these, which sees so many."""
    return max(1, min(RESIDENT * processors() // max(1, programs), keys // SHORTEST, MOST))


def backward(
    dout, dlse, q, k, v, out, lse, left, right, scale, softcap, alibi_slopes, dropout_p,
    dropout_seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bounds, count, samples,
):  # fmt: skip
    heads, head_dim = q.shape[-2:]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    base, delta = (lse.new_empty(lse.shape) for _ in range(2))
    sequences, longest_q, longest_k = extents(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    busy = is_busy(softcap, alibi_slopes, dropout_seed)
    arguments = shared_arguments(q, k, left, right, scale, softcap, dropout_p)
    where = addressing(dout, q, k, v, out, dq, dk)
    of_dout, of_q, of_k, of_v, of_out, of_dq, of_dk = (
        in_units(x, where["UNIT"]) for x in (dout, q, k, v, out, dq, dk)
    )

    packing, dense = packing_of(cu_seqlens_q, bounds), cu_seqlens_q is None
    shape = q, longest_q, longest_k, sequences, (left, right), packing
    config = configure("dq", *shape, dense and describable(k, v), busy)
    tiles = descriptors(config, "BLOCK_N", k, v)
    dq_kernel[grid_of(heads, longest_q, config["BLOCK_M"], sequences)](
        dout, dlse, q, k, v, out, lse, alibi_slopes, dropout_seed, cu_seqlens_q, cu_seqlens_k,
        *sides_of(bounds, queries=True, causal=right == 0), count, samples, dq, base, delta, *tiles,
        *arguments, of_dout, strides(dlse, 3), of_q, of_k, of_v, strides(alibi_slopes, 2), of_out,
        strides(lse, 3), of_dq, strides(delta, 3),
        HEAD_DIM=head_dim, **where, **config,
    )  # fmt: skip
    config = configure("dkdv", *shape, dense and describable(q, dout), busy)
    tiles = descriptors(config, "BLOCK_M", q, dout)
    dkdv_kernel[grid_of(k.shape[-2], longest_k, config["BLOCK_N"], sequences)](
        dout, q, k, v, base, delta, alibi_slopes, dropout_seed, cu_seqlens_q, cu_seqlens_k,
        *sides_of(bounds, queries=False, causal=right == 0), count, samples, dk, dv, *tiles,
        *arguments, of_dout, of_q, of_k, of_v, strides(alibi_slopes, 2), strides(delta, 3), of_dk,
        HEAD_DIM=head_dim, **where, **config,
    )  # fmt: skip
    return dq, dk, dv
