"""CPU backend: torch's own flash attention kernels, called on the active samples only.

They group heads as this op does. They know one mask by name, the causal one of equally many queries
and keys, which they fill in before they scale, by a factor that is to be positive, and take any
other as a matrix to add. They are not called with a query that sees no key, for which they give a
log-sum-exp of 0, nor with an empty sequence, on which they divide by zero. Queries without a key
are the first ones, and to leave them out moves no bottom-right aligned mask. They know no softcap,
no ALiBi and no dropout that could be told which weights to drop: with these, the reference runs in
their place, forward and, differentiated by torch, backward. Of several sequences in a row they take
one at a time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import wide
from ..routing import rows_of
from .reference import attend as attend_reference
from .reference import sequences

aten = torch.ops.aten
Index = tuple[Tensor | slice, ...]


class Options(NamedTuple):
    """What the scores go through, as the reference's `attend` takes it."""

    left: int
    right: int
    scale: float
    softcap: float
    alibi_slopes: Tensor | None
    dropout_p: float
    dropout_seed: Tensor | None
    bounds: Tensor | None

    @property
    def plain(self) -> bool:
        return not self.softcap and self.alibi_slopes is None and self.dropout_seed is None


def forward(
    q, k, v, left, right, scale, softcap, alibi_slopes, dropout_p, dropout_seed,
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bounds, count, samples, into=None,
):  # fmt: skip
    """into: out and lse, the memory for them."""
    options = Options(left, right, scale, softcap, alibi_slopes, dropout_p, dropout_seed, bounds)
    packed = cu_seqlens_q is not None
    if not packed and bounds is None and count is None and into is None:  # the results as they come
        out, lse = attend(q, k, v, options, torch.arange(len(q)))
        # Detached, they are views no more, which nobody could change in place
        return out.contiguous().detach(), lse.transpose(-1, -2).contiguous().detach()

    out, lse = into or (
        q.new_empty(q.shape),
        q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=wide(q.dtype)),
    )
    outs, lses, q, k, v = batched(out, lse.transpose(-1, -2), q, k, v, packed=packed)
    for of_q, of_k, chosen in parts(q, k, cu_seqlens_q, cu_seqlens_k, options, count, samples):
        outs[of_q], lses[of_q] = attend(q[of_q], k[of_k], v[of_k], options, chosen)
    return out, lse


def backward(
    dout, dlse, q, k, v, out, lse, left, right, scale, softcap, alibi_slopes, dropout_p,
    dropout_seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bounds, count, samples,
):  # fmt: skip
    options = Options(left, right, scale, softcap, alibi_slopes, dropout_p, dropout_seed, bounds)
    lse = lse.transpose(-1, -2)
    dlse = None if dlse is None else dlse.transpose(-1, -2)
    packed = cu_seqlens_q is not None
    if not packed and bounds is None and count is None:
        return attend_backward(dout, dlse, q, k, v, out, lse, options, torch.arange(len(q)))

    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    dq, dk, dv, dout, q, k, v, out, lse = batched(*grads, dout, q, k, v, out, lse, packed=packed)
    if dlse is not None:
        (dlse,) = batched(dlse, packed=packed)
    for of_q, of_k, chosen in parts(q, k, cu_seqlens_q, cu_seqlens_k, options, count, samples):
        of_dlse = None if dlse is None else dlse[of_q]
        dq[of_q], dk[of_k], dv[of_k] = attend_backward(
            dout[of_q], of_dlse, q[of_q], k[of_k], v[of_k], out[of_q], lse[of_q], options, chosen
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
    options: Options,
    count: Tensor | None,
    samples: Tensor | None,
) -> Iterator[tuple[Index, Index, Tensor]]:
    """What one call can take, a dense batch at once or a sequence: indices of q and of k, and which
    samples these are. The reference takes rows of several sequences, torch's kernels do not."""
    number = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    chosen = torch.arange(number)[rows_of(count, samples)]
    if options.bounds is not None and options.plain:
        for sample in chosen.unsqueeze(1):
            begins, ends = (side[sample].unique_consecutive() for side in options.bounds)
            for run in zip(begins.tolist(), ends.tolist(), strict=True):
                yield (sample, slice(*run)), (sample, slice(*run)), sample
        return
    if cu_seqlens_q is None or cu_seqlens_k is None:
        yield (chosen,), (chosen,), chosen
        return
    places = sequences(q[0], k[0], cu_seqlens_q, cu_seqlens_k, chosen)
    for (of_q, of_k), sample in zip(places, chosen.unsqueeze(1), strict=True):
        yield (slice(None), of_q), (slice(None), of_k), sample


def attend(
    q: Tensor, k: Tensor, v: Tensor, options: Options, samples: Tensor
) -> tuple[Tensor, Tensor]:
    """(batch, seqlen, heads, head_dim) -> the same, and (batch, seqlen, heads)."""
    if not options.plain:
        out, lse = attend_reference(q, k, v, *options, samples)
        return out, lse.transpose(1, 2)
    blind = blind_queries(q, k, options.right)
    if blind or q.numel() == 0:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lse = q.new_full(q.shape[:-1], float("-inf"), dtype=wide(q.dtype))
        if blind < q.shape[1] and q.numel():
            out[:, blind:], lse[:, blind:] = attend(q[:, blind:], k, v, options, samples)
        return out, lse

    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        heads_first(q),
        heads_first(k),
        heads_first(v),
        **visible(q, k, options),
        scale=options.scale,
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
    options: Options,
    samples: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend`'s inputs; dlse and lse are (batch, seqlen, heads), as `attend`'s."""
    if not options.plain:
        return attend_reference_backward(dout, dlse, q, k, v, options, samples)
    blind = blind_queries(q, k, options.right)
    if blind == q.shape[1] or q.numel() == 0:
        contiguous = torch.contiguous_format
        dq, dk, dv = (torch.zeros_like(x, memory_format=contiguous) for x in (q, k, v))
        return dq, dk, dv
    if blind:
        dout, q, out, lse = (x[:, blind:] for x in (dout, q, out, lse))
        dlse = None if dlse is None else dlse[:, blind:]

    dtype, head_dim = q.dtype, q.shape[-1]
    if dlse is not None:
        # The kernel takes Δ = Σ dO O from its inputs. One more channel, in which dO is 1, O is -dL
        # and V is 0, makes that Σ dO O - dL and leaves dP as it was. dL may not fit into 16 bits.
        q, k, v, out, dout = (x.to(dlse.dtype) for x in (q, k, v, out, dout))
        out = torch.cat((out, -dlse.unsqueeze(-1)), -1)
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
        **visible(q, k, options),
        scale=options.scale,
    )
    dq, dk, dv = (x.transpose(1, 2)[..., :head_dim].to(dtype) for x in grads)
    if blind:
        dq = F.pad(dq, (0, 0, 0, 0, blind, 0))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def attend_reference_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    samples: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    def reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attend_reference(q, k, v, *options, samples)

    # Not autograd, which is switched off inside an op
    (_, lse), pullback = torch.func.vjp(reference, q, k, v)
    of_lse = torch.zeros_like(lse) if dlse is None else dlse.transpose(1, 2)
    dq, dk, dv = pullback((dout, of_lse))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def blind_queries(q: Tensor, k: Tensor, right: int) -> int:
    """How many queries see no key. They are the first ones, those that end before any key."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if right < 0 or seqlen_k == 0:
        return 0 if seqlen_k else seqlen_q
    return max(0, seqlen_q - seqlen_k - right)


def visible(q: Tensor, k: Tensor, options: Options) -> dict[str, bool | Tensor | None]:
    """The window as options of the kernels."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    left, right = options.left, options.right
    all_left = left < 0 or left >= seqlen_k - 1
    all_right = right < 0 or right >= seqlen_q - 1
    causal = right == 0 and seqlen_q == seqlen_k and options.scale > 0
    if all_left and (all_right or causal):
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
