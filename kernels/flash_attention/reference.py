"""The equations over the whole score matrix, in the inputs' dtype with the softmax in float32.

Differentiable by autograd; float64 stays float64.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ..precision import wide
from ..routing import Route, put, rows_of, take


def flash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    route: Route | None,
) -> tuple[Tensor, Tensor]:
    """See flash_attention. left, right: the window's sides, -1 for unbounded."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        chosen_q, chosen_k, chosen_v = (take(route, tensor) for tensor in (q, k, v))
        out, lse = attend(chosen_q, chosen_k, chosen_v, left, right, scale)
        return put(route, out, len(q)), put(route, lse, len(q))

    rows = slice(None) if route is None else rows_of(route.count, route.samples)
    out = torch.full_like(q, float("nan"))
    lse = q.new_full((q.shape[1], q.shape[0]), float("nan"), dtype=wide(q.dtype))
    nothing = slice(0, 0), slice(0, 0)  # ties the results to the inputs where none is chosen
    for of_q, of_k in [nothing, *sequences(q, k, cu_seqlens_q, cu_seqlens_k, rows)]:
        one_out, one_lse = attend(q[None, of_q], k[None, of_k], v[None, of_k], left, right, scale)
        out = out.slice_scatter(one_out[0], 0, of_q.start, of_q.stop)
        lse = lse.slice_scatter(one_lse[0], 1, of_q.start, of_q.stop)
    return out, lse


def attend(
    q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(batch, seqlen, heads, head_dim) -> the same, and (batch, heads, seqlen)."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k).to(wide(q.dtype)) * scale
    key = torch.arange(k.shape[1], device=q.device)
    own = torch.arange(q.shape[1], device=q.device).unsqueeze(-1) + k.shape[1] - q.shape[1]
    if left >= 0:
        scores = scores.masked_fill(key < own - left, float("-inf"))
    if right >= 0:
        scores = scores.masked_fill(key > own + right, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse.isneginf(), 0).unsqueeze(-1)).exp()
    return torch.einsum("bhij,bjhd->bihd", weights.to(v.dtype), v), lse


def sequences(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, rows: Tensor | slice
) -> list[tuple[slice, slice]]:
    """Where the chosen sequences lie in the packed q and in the packed k."""
    slices = []
    for name, bounds, packed in (("q", cu_seqlens_q, q), ("k", cu_seqlens_k, k)):
        ends = bounds.tolist()
        if ends != sorted(ends) or ends[0] != 0 or ends[-1] > len(packed):
            raise ValueError(
                f"cu_seqlens_{name} must grow from 0 to {name}'s {len(packed)} tokens, got {ends}"
            )
        slices.append([slice(*pair) for pair in pairwise(ends)])
    chosen = torch.arange(len(cu_seqlens_q) - 1)[rows].tolist()
    return [(slices[0][n], slices[1][n]) for n in chosen]
