"""Attention in one pass over the keys (Dao 2023, "FlashAttention-2", algorithm 1).

    S = scale · Q Kᵀ        the score of every query on every key it may attend to
    L_i = log Σ_j exp S_ij  the log-sum-exp
    O = exp(S − L) V        the softmax of the scores, applied to the values

The backward needs no more than L to rebuild the softmax P = exp(S − L) (algorithm 2):

    dV = Pᵀ dO,   dP = dO Vᵀ,   dS = P ∘ (dP − Δ),   Δ_i = Σ_d dO_id O_id − dL_i,
    dQ = scale · dS K,   dK = scale · dSᵀ Q
"""

import torch
from torch import Tensor

from ..backend import Impl, resolve_for
from ..precision import autocast
from ..routing import Route, tensors_of
from .bounds import bounds_of
from .reference import flash_attention_reference

__all__ = ["bounds_of", "flash_attention"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    bounds: Tensor | None = None,
    return_lse: bool = False,
    route: Route | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, causal or not, with grouped heads, sliding windows and packed sequences.

    q: (batch, seqlen_q, heads, head_dim), float16, bfloat16, float32 or float64.
    k, v: (batch, seqlen_k, kv_heads, head_dim), q's dtype. `kv_heads` divides `heads`, and query
        head h uses kv head h // (heads / kv_heads). Any strides. Under torch.autocast all three are
        taken in its dtype, as by torch's own attention.
    causal: the last query sees all keys, each one before it one key less (bottom-right aligned).
    window_size: how many keys to the left and to the right of its own position a query sees, -1
        for all. Query i stands at key i + seqlen_k - seqlen_q. `causal` makes the right side 0.
    softmax_scale: factor on the scores; head_dim ** -0.5 by default.
    softcap: c > 0 replaces a scaled score s by c · tanh(s / c) (Gemma 2, arXiv:2408.00118). 0 is no
        cap.
    alibi_slopes: floating, (heads,) or (batch, heads), packed (sequences, heads): then a score
        loses slope · |i + seqlen_k - seqlen_q - j| for query i and key j (Press et al. 2022,
        arXiv:2108.12409). Without gradient.
    dropout_p: probability, below 1, of leaving a weight of the softmax out; the others grow by
        1 / (1 - dropout_p). The log-sum-exp is that without dropout.
    dropout_seed: int64, shape (), on q's device: the same one drops the same weights, forward and
        backward, in all implementations. By default drawn from torch's generator of that device.
    cu_seqlens_q: int32 (sequences + 1,): sequence n of the packed q, (total_q, heads, head_dim),
        is q[cu_seqlens_q[n] : cu_seqlens_q[n + 1]]. What lies past the last sequence is left
        unwritten in the results and gradients.
    cu_seqlens_k: the same for the packed k and v, (total_k, kv_heads, head_dim); cu_seqlens_q by
        default.
    max_seqlen_q, max_seqlen_k: upper bounds on the lengths of packed sequences, so that a GPU
        launches no programs beyond them. Tokens of longer sequences may be left unwritten. By
        default the totals.
    bounds: int32 (2, batch, seqlen): several sequences in each row, of which a query sees its own;
        where that of each token begins and ends, as `bounds_of(seq_idx)` has it. It asks no host
        how many they are. There are as many keys as queries; cu_seqlens is for other layouts.
    return_lse: return (out, lse) instead of out. lse is the log-sum-exp of the scaled scores,
        (batch, heads, seqlen_q), packed (heads, total_q); float32, or float64 for float64 inputs.
        Differentiable.
    route: the samples (packed: the sequences) to work on; the rows of others are left unwritten in
        the results and in the gradients of q, k and v. None means all.

    Returns out, like q. A query that sees no key gives zeros, and -inf in lse. Deterministic,
    forward and backward.
    Raises ValueError where shapes, dtypes or options are not as above; for impl="triton" also where
    head_dim is above 256, a sequence longer than 65535 of the kernel's tiles (a million tokens or
    more), or the heads of all sequences have 2³¹ tiles together, each as many as the longest.
    """
    q, k, v = autocast(q, k, v)
    check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    check_bounds(q, k, bounds, cu_seqlens_q)
    sides = isinstance(window_size, tuple | list) and len(window_size) == 2
    if not sides or min(window_size) < -1:
        raise ValueError(
            f"window_size must be (left, right), each -1 or at least 0, got {window_size}"
        )
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"softcap must be 0 or a positive number, got {softcap}")
    if cu_seqlens_q is None and (max_seqlen_q, max_seqlen_k) != (None, None):
        raise ValueError("max_seqlen_q and max_seqlen_k must come with cu_seqlens_q")
    check_slopes(q, alibi_slopes, cu_seqlens_q)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    if dropout_p == 0:
        dropout_seed = None
    elif dropout_seed is None:
        dropout_seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=q.device)
    elif dropout_seed.dtype != torch.int64 or dropout_seed.ndim:
        raise ValueError(
            "dropout_seed must be int64 of shape (),"
            f" got {dropout_seed.dtype} of shape {tuple(dropout_seed.shape)}"
        )
    # No sequence is longer, and positions plus sides stay within int32
    left, right = (min(side, 2**30) for side in window_size)
    right = 0 if causal else right
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q

    routed = tensors_of(route, batch_of(q, cu_seqlens_q))
    impl = resolve_for(
        impl, q, k, v, alibi_slopes, dropout_seed, cu_seqlens_q, cu_seqlens_k, bounds, *routed
    )
    if impl == "reference":
        out, lse = flash_attention_reference(
            q, k, v, left, right, scale, softcap, alibi_slopes, dropout_p, dropout_seed,
            cu_seqlens_q, cu_seqlens_k, bounds, route,
        )  # fmt: skip
    else:
        from .ops import apply

        out, lse = apply(
            q, k, v, left, right, scale, softcap, alibi_slopes, dropout_p, dropout_seed,
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bounds, *routed, impl,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def check_tensors(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> None:
    packed = cu_seqlens_q is not None
    if cu_seqlens_k is not None and not packed:
        raise ValueError("cu_seqlens_k must come with cu_seqlens_q, got cu_seqlens_k alone")
    layout = "(total, heads, head_dim)" if packed else "(batch, seqlen, heads, head_dim)"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != (3 if packed else 4):
            raise ValueError(f"{name} must be {layout}, got {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype or tensor.dtype not in DTYPES:
            raise ValueError(
                "q, k and v must share one dtype of float16, bfloat16, float32 and float64,"
                f" got {tensor.dtype} for {name} and {q.dtype} for q"
            )
    if q.shape[-1] == 0:
        raise ValueError(f"q must have a head_dim of at least 1, got {tuple(q.shape)}")
    if k.shape != v.shape:
        raise ValueError(
            f"k and v must have the same shape, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[-1] != q.shape[-1] or (not packed and k.shape[0] != q.shape[0]):
        raise ValueError(
            f"k and v must have q's batch and head_dim, got {tuple(k.shape)} for {tuple(q.shape)}"
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"k must have a number of heads that divides q's {q.shape[-2]}, got {k.shape[-2]}"
        )
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if bounds is not None and (
            bounds.dtype != torch.int32 or bounds.ndim != 1 or len(bounds) < 1
        ):
            raise ValueError(
                f"{name} must be int32 (sequences + 1,), got {bounds.dtype} {tuple(bounds.shape)}"
            )
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        if len(cu_seqlens_q) != len(cu_seqlens_k):
            raise ValueError(
                "cu_seqlens_q and cu_seqlens_k must hold as many sequences,"
                f" got {len(cu_seqlens_q) - 1} and {len(cu_seqlens_k) - 1}"
            )


def check_bounds(q: Tensor, k: Tensor, bounds: Tensor | None, cu_seqlens_q: Tensor | None) -> None:
    if bounds is None:
        return
    if cu_seqlens_q is not None:
        raise ValueError("bounds and cu_seqlens_q exclude each other, got both")
    if bounds.dtype != torch.int32 or bounds.shape != (2, *q.shape[:2]):
        raise ValueError(
            f"bounds must be int32 {(2, *q.shape[:2])}, got {bounds.dtype} {tuple(bounds.shape)}"
        )
    if k.shape[1] != q.shape[1]:
        raise ValueError(
            f"bounds take as many keys as queries, got {k.shape[1]} keys of {q.shape[1]} queries"
        )


def batch_of(q: Tensor, cu_seqlens_q: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1


def check_slopes(q: Tensor, slopes: Tensor | None, cu_seqlens_q: Tensor | None) -> None:
    if slopes is None:
        return
    heads = q.shape[-2]
    samples = batch_of(q, cu_seqlens_q)
    fits = slopes.shape == (heads,) or slopes.shape == (samples, heads)
    if not fits or not slopes.is_floating_point():
        raise ValueError(
            f"alibi_slopes must be floating, ({heads},) or ({samples}, {heads}),"
            f" got {slopes.dtype} {tuple(slopes.shape)}"
        )
