"""flash-attn's functions on `tossup.flash_attention`.

Layouts are the op's own; packed tensors are split into views. Upstream runs float16 and bfloat16;
float32 (and float64, on the CPU) runs here too. Every backward is deterministic, whatever
`deterministic` says. `softmax_lse` has no gradient, and is +inf for a query that sees no key, as
upstream's.
"""

import torch
from torch import Tensor

from ..flash_attention import flash_attention
from ..rotary import rotary

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Softmax attention. The options mean the same in all the functions of this module.

    q: (batch, seqlen_q, heads, head_dim). k, v: (batch, seqlen_k, kv_heads, head_dim), with
    kv_heads dividing heads.
    dropout_p: probability of leaving a weight out; 0 in evaluation.
    softmax_scale: factor on the scores; head_dim ** -0.5 by default.
    causal: the last query sees all keys, each one before it one key less (bottom-right aligned).
    window_size: how many keys to the left and to the right of its own position a query sees;
        negative for all, as is seqlen_k or more.
    softcap: c > 0 replaces a score s by c · tanh(s / c).
    alibi_slopes: float32 (heads,) or (batch, heads): score (i, j) loses slope · |i + seqlen_k −
        seqlen_q − j|.
    return_attn_probs: return (out, softmax_lse, S_dmask) instead of out, softmax_lse float32
        (batch, heads, seqlen_q), of the scores as above, where upstream's leaves out what ALiBi
        takes from a whole row. S_dmask is empty, as upstream's without dropout.

    Returns out, like q. Raises NotImplementedError for return_attn_probs with dropout, whose mask
    nobody stores, and ValueError where a shape, a dtype or an option is not as above.
    """
    return attend(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` on q, k and v from one tensor, (batch, seqlen, 3, heads, head_dim)."""
    q, k, v = split("qkv", qkv, 3, axis=2)
    return attend(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` on k and v from one tensor, (batch, seqlen_k, 2, kv_heads, head_dim)."""
    k, v = split("kv", kv, 2, axis=2)
    return attend(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """`flash_attn_func` on packed sequences.

    q: (total_q, heads, head_dim). k, v: (total_k, kv_heads, head_dim).
    cu_seqlens_q, cu_seqlens_k: int32 (sequences + 1,): sequence n of q is q[cu_seqlens_q[n] :
        cu_seqlens_q[n + 1]]. What lies past the last one is left unwritten.
    max_seqlen_q, max_seqlen_k: the longest sequences.
    alibi_slopes: (heads,) or (sequences, heads).
    return_attn_probs: softmax_lse is (heads, total_q).
    Raises NotImplementedError where block_table is given.
    """
    refuse_pages(block_table)
    return attend(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` on q, k and v from one tensor, (total, 3, heads, head_dim)."""
    q, k, v = split("qkv", qkv, 3, axis=1)
    return attend(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` on k and v from one tensor, (total_k, 2, kv_heads, head_dim)."""
    k, v = split("kv", kv, 2, axis=1)
    return attend(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a cache of keys and values, to which new ones are appended in place before.

    q: (batch, seqlen_q, heads, head_dim).
    k_cache, v_cache: (entries, seqlen_cache, kv_heads, head_dim).
    k, v: (batch, seqlen_new, kv_heads, head_dim), written at cache_seqlens.
    rotary_cos, rotary_sin: (at least seqlen_cache, rotary_dim / 2). Turns k at its place in the
        cache, and q at cache_seqlens plus its index, or at cache_seqlens if neither causality nor a
        window tells the queries apart. Only where k is given.
    cache_seqlens: how far the cache is filled: an int, or int32 (batch,), which stays on the
        device. All of it by default, which leaves no room for k.
    cache_batch_idx: integers (batch,): the entry of each sample, distinct where k is given. The
        entries are then gathered, which is a copy of them. Entry n for sample n by default.
    cache_leftpad: integers (batch,): where each sample begins in its entry. 0 by default.
    rotary_interleaved: pair channels 2i and 2i + 1 instead of i and i + rotary_dim / 2.
    num_splits: a hint to upstream's scheduler; it changes no result, and is not used.
    return_softmax_lse: return (out, softmax_lse), softmax_lse float32 (batch, heads, seqlen_q).

    Returns out, like q, without gradients. An unevenly strided cache is copied to be read.
    Raises NotImplementedError where block_table is given, and ValueError where a shape, a dtype or
    an option is not as above.
    """
    refuse_pages(block_table)
    check_window(window_size)
    check_cache(q, k_cache, k, v, rotary_cos, rotary_sin, cache_seqlens)
    batch, capacity = q.shape[0], k_cache.shape[1]
    filled = capacity if cache_seqlens is None else cache_seqlens
    if rotary_cos is not None and rotary_sin is not None and k is not None:
        k = turned(k, rotary_cos, rotary_sin, filled, rotary_interleaved)
        if causal or any(0 <= side < capacity for side in window_size):
            q = turned(q, rotary_cos, rotary_sin, filled, rotary_interleaved)
        else:
            as_heads = q.flatten(1, 2).unsqueeze(1)  # one token of more heads
            q = turned(as_heads, rotary_cos, rotary_sin, filled, rotary_interleaved).view(q.shape)
    if k is not None and v is not None:
        for cache, new in ((k_cache, k), (v_cache, v)):
            append(cache, new, filled, cache_batch_idx)
        filled = filled + k.shape[1]

    options = (0.0, softmax_scale, causal, window_size, softcap)
    if isinstance(filled, int) and cache_batch_idx is None and cache_leftpad is None:
        keys, values = k_cache[:batch, :filled], v_cache[:batch, :filled]
        result = attend(
            q, keys, values, *options, alibi_slopes, return_softmax_lse, capacity=capacity
        )
        return result[:2] if isinstance(result, tuple) else result

    keys, values, period = packed_caches(k_cache, v_cache, cache_batch_idx)
    bounds_q, bounds_k = gap_bounds(q, period, filled, cache_leftpad)
    if alibi_slopes is not None and alibi_slopes.ndim == 2:
        alibi_slopes = alibi_slopes.repeat_interleave(2, dim=0)
    result = attend(
        q.flatten(0, 1), keys, values, *options, alibi_slopes, return_softmax_lse, bounds_q,
        bounds_k, q.shape[1], capacity=capacity,
    )  # fmt: skip
    if not isinstance(result, tuple):
        return result.view(q.shape)
    out, lse, _ = result
    return out.view(q.shape), lse.unflatten(1, q.shape[:2]).transpose(0, 1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    capacity: int | None = None,
) -> Result:
    """capacity: keys that a cache can hold; None where k is all there is."""
    if return_attn_probs and dropout_p > 0:
        raise NotImplementedError(
            "return_attn_probs must be False where dropout_p > 0, as the dropout mask is never"
            f" stored, got dropout_p={dropout_p}"
        )
    check_window(window_size)
    left, right = window_size
    # A tensor here would have to be read. Without it the grid covers the packed length.
    longest_q, longest_k = (
        length if isinstance(length, int) else None for length in (max_seqlen_q, max_seqlen_k)
    )
    if right >= next(n for n in (capacity, longest_k, k.shape[-3]) if n is not None):
        right = -1  # upstream's rule: it matters to queries that stand before the first key
    result = flash_attention(
        q,
        k,
        v,
        causal=causal,
        window_size=(max(left, -1), max(right, -1)),
        softmax_scale=softmax_scale,
        softcap=max(softcap, 0.0),
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        return_lse=return_attn_probs,
    )
    if not isinstance(result, tuple):
        return result
    out, lse = result[0], result[1].detach()
    return out, lse.masked_fill(lse.isneginf(), float("inf")), q.new_empty(0)


def split(name: str, tensor: Tensor, parts: int, axis: int) -> tuple[Tensor, ...]:
    if tensor.ndim != axis + 3 or tensor.shape[axis] != parts:
        layout = "(total," if axis == 1 else "(batch, seqlen,"
        raise ValueError(
            f"{name} must be {layout} {parts}, heads, head_dim), got {tuple(tensor.shape)}"
        )
    return tensor.unbind(axis)


def check_window(window_size: tuple[int, int]) -> None:
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise ValueError(f"window_size must be (left, right), got {window_size!r}")


def refuse_pages(block_table: Tensor | None) -> None:
    if block_table is not None:
        raise NotImplementedError(
            "block_table must be None, as paged caches are not implemented,"
            f" got {tuple(block_table.shape)}"
        )


def check_cache(
    q: Tensor,
    k_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: int | Tensor | None,
) -> None:
    if (k is None) != (v is None):
        raise ValueError(f"k and v must come together, got {'v' if k is None else 'k'} alone")
    if (rotary_cos is None) != (rotary_sin is None):
        alone = "rotary_sin" if rotary_cos is None else "rotary_cos"
        raise ValueError(f"rotary_cos and rotary_sin must come together, got {alone} alone")
    if k is None and rotary_cos is not None:
        raise ValueError("rotary_cos must be None where k is None, got a tensor")
    if k is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens must say where to write k, got None")
    if isinstance(cache_seqlens, int):
        end = cache_seqlens + (0 if k is None else k.shape[1])
        if not 0 <= cache_seqlens <= end <= k_cache.shape[1]:
            raise ValueError(
                f"cache_seqlens must leave room for k in the {k_cache.shape[1]} places of k_cache,"
                f" got {cache_seqlens} and {end - cache_seqlens} new ones"
            )
    elif cache_seqlens is not None and cache_seqlens.shape != q.shape[:1]:
        raise ValueError(
            f"cache_seqlens must be an int or (batch,) = ({q.shape[0]},),"
            f" got {tuple(cache_seqlens.shape)}"
        )


def places(filled: int | Tensor, count: int, device: torch.device) -> Tensor:
    """The `count` places from `filled` on: (count,), or (batch, count) for a tensor (batch,)."""
    steps = torch.arange(count, device=device)
    return steps + (filled if isinstance(filled, int) else filled.unsqueeze(1))


def turned(x: Tensor, cos: Tensor, sin: Tensor, filled: int | Tensor, interleaved: bool) -> Tensor:
    at = places(filled, x.shape[1], x.device)
    return rotary(x, cos[at].float(), sin[at].float(), interleaved=interleaved)


def append(cache: Tensor, new: Tensor, filled: int | Tensor, entries: Tensor | None) -> None:
    """Write (batch, count, …) into the cache after what it holds, without reading a length."""
    if entries is None:
        entries = torch.arange(len(new), device=new.device)
    at = places(filled, new.shape[1], new.device)
    cache[entries.long().unsqueeze(1), at] = new


def packed_caches(
    k_cache: Tensor, v_cache: Tensor, entries: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """Both caches as packed keys and values, and how far apart entries are there.

    They are views where an entry is a whole number of tokens away from the next one, as in a cache
    cut off at some length, and in both caches the same.
    """
    if entries is not None:
        k_cache, v_cache = (cache.index_select(0, entries) for cache in (k_cache, v_cache))
    (apart, token), seqlen = k_cache.stride()[:2], k_cache.shape[1]
    if apart % token or apart < seqlen * token or k_cache.stride()[:2] != v_cache.stride()[:2]:
        return k_cache.flatten(0, 1), v_cache.flatten(0, 1), seqlen
    period = apart // token
    total = (len(k_cache) - 1) * period + seqlen
    keys, values = (
        cache.as_strided((total, *cache.shape[2:]), cache.stride()[1:])
        for cache in (k_cache, v_cache)
    )
    return keys, values, period


def gap_bounds(
    q: Tensor, period: int, filled: int | Tensor, leftpad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """cu_seqlens of queries and keys. Before each sequence comes a gap: keys that no query sees."""
    batch, seqlen = q.shape[:2]
    entry = period * torch.arange(batch, device=q.device)
    starts = entry if leftpad is None else entry + leftpad
    ends = torch.maximum(entry + filled, starts)
    bounds_k = torch.stack((starts, ends), dim=1).flatten()
    bounds_q = seqlen * (torch.arange(2 * batch + 1, device=q.device) // 2)
    return bounds_q.int(), torch.nn.functional.pad(bounds_k, (1, 0)).int()
