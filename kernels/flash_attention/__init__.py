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

from ..backend import Impl, resolve_impl
from ..routing import Route, tensors_of
from .reference import flash_attention_reference

__all__ = ["flash_attention"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    route: Route | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, causal or not, with grouped heads, sliding windows and packed sequences.

    q: (batch, seqlen_q, heads, head_dim), float16, bfloat16, float32 or float64.
    k, v: (batch, seqlen_k, kv_heads, head_dim), q's dtype. `kv_heads` divides `heads`, and query
        head h uses kv head h // (heads / kv_heads). Any strides.
    causal: the last query sees all keys, each one before it one key less (bottom-right aligned).
    window_size: how many keys to the left and to the right of its own position a query sees, -1
        for all. Query i stands at key i + seqlen_k - seqlen_q. `causal` makes the right side 0.
    softmax_scale: factor on the scores; head_dim ** -0.5 by default.
    cu_seqlens_q: int32 (sequences + 1,): sequence n of the packed q, (total_q, heads, head_dim),
        is q[cu_seqlens_q[n] : cu_seqlens_q[n + 1]]. What lies behind the last sequence is left
        unwritten in the results and gradients.
    cu_seqlens_k: the same for the packed k and v, (total_k, kv_heads, head_dim); cu_seqlens_q by
        default.
    return_lse: return (out, lse) instead of out. lse is the log-sum-exp of the scaled scores,
        (batch, heads, seqlen_q), packed (heads, total_q); float32, or float64 for float64 inputs.
        Differentiable.
    route: the samples (packed: the sequences) to work on; the rows of others are left unwritten in
        the results and in the gradients of q, k and v. None means all.

    Returns out, like q. A query that sees no key gives zeros, and -inf in lse.
    Raises ValueError where shapes, dtypes or options are not as above.
    """
    check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    if len(window_size) != 2 or min(window_size) < -1:
        raise ValueError(
            f"window_size must be (left, right), each -1 or at least 0, got {window_size}"
        )
    left, right = window_size
    right = 0 if causal else right
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q

    impl = resolve_impl(impl, q.device)
    if impl == "reference":
        out, lse = flash_attention_reference(
            q, k, v, left, right, scale, cu_seqlens_q, cu_seqlens_k, route
        )
    else:
        from .ops import flash_attention_op

        out, lse = flash_attention_op(
            q, k, v, left, right, scale, cu_seqlens_q, cu_seqlens_k, *tensors_of(route), impl
        )
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
