"""The equations over the whole score matrix, in the inputs' dtype with the softmax in float32.

Differentiable by autograd; float64 stays float64.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ..philox import LOW, philox
from ..precision import wide
from ..routing import Route, put, take


def flash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    bounds: Tensor | None,
    route: Route | None,
) -> tuple[Tensor, Tensor]:
    """See flash_attention. left, right: the window's sides, -1 for unbounded."""
    samples = torch.arange(len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1)
    samples = take(route, samples.to(q.device))
    options = left, right, scale, softcap, alibi_slopes, dropout_p, dropout_seed, bounds
    if cu_seqlens_q is None or cu_seqlens_k is None:
        chosen_q, chosen_k, chosen_v = (take(route, tensor) for tensor in (q, k, v))
        out, lse = attend(chosen_q, chosen_k, chosen_v, *options, samples)
        return put(route, out, len(q)), put(route, lse, len(q))

    out = torch.full_like(q, float("nan"))
    lse = q.new_full((q.shape[1], q.shape[0]), float("nan"), dtype=wide(q.dtype))
    nothing = slice(0, 0), slice(0, 0)  # ties the results to the inputs where none is chosen
    places = [nothing, *sequences(q, k, cu_seqlens_q, cu_seqlens_k, samples)]
    for (of_q, of_k), sample in zip(
        places, [samples.new_zeros(1), *samples.unsqueeze(1)], strict=True
    ):
        one_out, one_lse = attend(q[None, of_q], k[None, of_k], v[None, of_k], *options, sample)
        out = out.slice_scatter(one_out[0], 0, of_q.start, of_q.stop)
        lse = lse.slice_scatter(one_lse[0], 1, of_q.start, of_q.stop)
    return out, lse


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    bounds: Tensor | None,
    samples: Tensor,
) -> tuple[Tensor, Tensor]:
    """(batch, seqlen, heads, head_dim) -> the same, and (batch, heads, seqlen).

    samples: int64 (batch,): which samples, or packed sequences, these are.
    """
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k).to(wide(q.dtype)) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    key = torch.arange(k.shape[1], device=q.device)
    query = torch.arange(q.shape[1], device=q.device).unsqueeze(-1)
    own = query + k.shape[1] - q.shape[1]
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(scores.dtype)
        slopes = slopes[samples] if slopes.ndim == 2 else slopes.expand(len(samples), -1)
        scores = scores - slopes[:, :, None, None] * (own - key).abs()
    if left >= 0:
        scores = scores.masked_fill(key < own - left, float("-inf"))
    if right >= 0:
        scores = scores.masked_fill(key > own + right, float("-inf"))
    if bounds is not None:
        begins, ends = bounds[:, samples, None, :, None]
        scores = scores.masked_fill((key < begins) | (key >= ends), float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse.isneginf(), 0).unsqueeze(-1)).exp()
    if dropout_seed is not None:
        head = torch.arange(heads, device=q.device)[:, None, None]
        words = philox(
            (dropout_seed & LOW, dropout_seed >> 32 & LOW),
            (key, query, head, samples[:, None, None, None]),
        )
        dropped = torch.as_tensor(words) < round(dropout_p * 2**32)
        weights = weights.masked_fill(dropped, 0) / (1 - dropout_p)
    return torch.einsum("bhij,bjhd->bihd", weights.to(v.dtype), v), lse


def sequences(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, samples: Tensor
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
    return [(slices[0][n], slices[1][n]) for n in samples.tolist()]
