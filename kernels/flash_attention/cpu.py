"""CPU backend: torch's own flash attention kernels, called on the active samples only.

They group heads as this op does. They know one mask by name, the causal one of equally many queries
and keys, and take any other as a matrix to add. They are not called with a query that sees no key,
for which they give a log-sum-exp of 0, nor with an empty sequence, on which they divide by zero.
Queries without a key are the first ones, and to leave them out moves no bottom-right aligned mask.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import wide
from ..routing import rows_of
from .reference import sequences

aten = torch.ops.aten
Index = tuple[Tensor | slice, ...]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens_q is None and count is None:  # the results as they come, without a copy
        out, lse = attend(q, k, v, left, right, scale)
        return out, lse.transpose(-1, -2)

    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:-1], dtype=wide(q.dtype))
    outs, lses, q, k, v = batched(out, lse, q, k, v, packed=cu_seqlens_q is not None)
    for of_q, of_k in parts(q, k, cu_seqlens_q, cu_seqlens_k, count, samples):
        outs[of_q], lses[of_q] = attend(q[of_q], k[of_k], v[of_k], left, right, scale)
    return out, lse.transpose(-1, -2)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    left: int,
    right: int,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    lse = lse.transpose(-1, -2)
    dlse = None if dlse is None else dlse.transpose(-1, -2)
    if cu_seqlens_q is None and count is None:
        return attend_backward(dout, dlse, q, k, v, out, lse, left, right, scale)

    packed = cu_seqlens_q is not None
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    dq, dk, dv, dout, q, k, v, out, lse = batched(*grads, dout, q, k, v, out, lse, packed=packed)
    if dlse is not None:
        (dlse,) = batched(dlse, packed=packed)
    for of_q, of_k in parts(q, k, cu_seqlens_q, cu_seqlens_k, count, samples):
        dq[of_q], dk[of_k], dv[of_k] = attend_backward(
            dout[of_q],
            None if dlse is None else dlse[of_q],
            q[of_q],
            k[of_k],
            v[of_k],
            out[of_q],
            lse[of_q],
            left,
            right,
            scale,
        )
    return grads[0], grads[1], grads[2]


def batched(*tensors: Tensor, packed: bool) -> list[Tensor]:
    """Packed sequences as a batch of one."""
    return [tensor.unsqueeze(0) if packed else tensor for tensor in tensors]


def parts(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
) -> Iterator[tuple[Index, Index]]:
    """What one call can take, as indices of q and of k: a dense batch at once, or a sequence."""
    rows = rows_of(count, samples)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        yield (rows,), (rows,)
        return
    for of_q, of_k in sequences(q[0], k[0], cu_seqlens_q, cu_seqlens_k, rows):
        yield (slice(None), of_q), (slice(None), of_k)


def attend(
    q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(batch, seqlen, heads, head_dim) -> the same, and (batch, seqlen, heads)."""
    blind = blind_queries(q, k, right)
    if blind or q.numel() == 0:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lse = q.new_full(q.shape[:-1], float("-inf"), dtype=wide(q.dtype))
        if blind < q.shape[1] and q.numel():
            out[:, blind:], lse[:, blind:] = attend(q[:, blind:], k, v, left, right, scale)
        return out, lse

    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        heads_first(q),
        heads_first(k),
        heads_first(v),
        **visible(q, k, left, right),
        scale=scale,
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


def attend_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    left: int,
    right: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend`'s inputs; dlse and lse are (batch, seqlen, heads), as `attend`'s."""
    blind = blind_queries(q, k, right)
    if blind == q.shape[1] or q.numel() == 0:
        contiguous = torch.contiguous_format
        dq, dk, dv = (torch.zeros_like(x, memory_format=contiguous) for x in (q, k, v))
        return dq, dk, dv
    if blind:
        dout, q, out, lse = (x[:, blind:] for x in (dout, q, out, lse))
        dlse = None if dlse is None else dlse[:, blind:]

    head_dim = q.shape[-1]
    options = visible(q, k, left, right)
    if dlse is not None:
        # The kernel takes Δ = Σ dO O from its inputs. One more channel, in which dO is 1, O is -dL
        # and V is 0, makes that Σ dO O - dL and leaves dP as it was.
        out = torch.cat((out, -dlse.unsqueeze(-1).to(out.dtype)), -1)
        dout = F.pad(dout, (0, 1), value=1.0)
        q, k, v = (F.pad(x, (0, 1)) for x in (q, k, v))

    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        heads_first(dout),
        heads_first(q),
        heads_first(k),
        heads_first(v),
        heads_first(out),
        lse.transpose(1, 2),
        dropout_p=0.0,
        **options,
        scale=scale,
    )
    dq, dk, dv = (x.transpose(1, 2)[..., :head_dim] for x in grads)
    if blind:
        dq = F.pad(dq, (0, 0, 0, 0, blind, 0))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def blind_queries(q: Tensor, k: Tensor, right: int) -> int:
    """How many queries see no key. They are the first ones, those that end before any key."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if right < 0 or seqlen_k == 0:
        return 0 if seqlen_k else seqlen_q
    return max(0, seqlen_q - seqlen_k - right)


def visible(q: Tensor, k: Tensor, left: int, right: int) -> dict[str, bool | Tensor | None]:
    """The window as options of the kernels."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    all_left = left < 0 or left >= seqlen_k - 1
    all_right = right < 0 or right >= seqlen_q - 1
    if all_left and (all_right or (right == 0 and seqlen_q == seqlen_k)):
        return {"is_causal": not all_right, "attn_mask": None}
    key = torch.arange(seqlen_k)
    own = torch.arange(seqlen_q).unsqueeze(-1) + seqlen_k - seqlen_q
    hidden = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
    if not all_left:
        hidden |= key < own - left
    if not all_right:
        hidden |= key > own + right
    mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf"))
    return {"is_causal": False, "attn_mask": mask}


def heads_first(x: Tensor) -> Tensor:
    """(batch, seqlen, heads, head_dim) as the kernels want it: heads second, channels dense."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)
