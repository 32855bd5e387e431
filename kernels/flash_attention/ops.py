"""torch.library registration: schema, shapes for tracing, gradients."""

import torch
from torch import Tensor

from ..backend import call_backend
from ..library import differentiable, mutating_op
from ..precision import wide
from ..routing import snapshot


@torch.library.custom_op("tossup::flash_attention", mutates_args=())
def flash_attention_op(
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
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    bounds: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return call_backend(
        __package__, impl, "forward",
        q, k, v, left, right, scale, softcap, alibi_slopes, dropout_p, dropout_seed,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bounds, count, samples,
    )  # fmt: skip


@flash_attention_op.register_fake
def _(q, *others):
    *batch, seqlen, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((*batch, heads, seqlen), dtype=wide(q.dtype))


@mutating_op("flash_attention_into", mutates_args=("out", "lse"))
def flash_attention_into_op(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    scale: float,
    bounds: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
    impl: str,
) -> None:
    """The forward pass into given memory: out of any strides, lse contiguous along seqlen."""
    plain = 0.0, None, 0.0, None, None, None, None, None
    call_backend(
        __package__, impl, "forward",
        q, k, v, left, right, scale, *plain, bounds, count, samples, (out, lse),
    )  # fmt: skip


@torch.library.custom_op("tossup::flash_attention_backward", mutates_args=())
def flash_attention_backward_op(
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
    softcap: float,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    bounds: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return call_backend(
        __package__, impl, "backward",
        dout, dlse, q, k, v, out, lse, left, right, scale, softcap, alibi_slopes, dropout_p,
        dropout_seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bounds, count,
        samples,
    )  # fmt: skip


@flash_attention_backward_op.register_fake
def _(dout, dlse, q, k, v, *others):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def save_for_backward(ctx, inputs, output):
    q, k, v, left, right, scale, softcap, slopes, dropout_p, seed, *others = inputs
    cu_seqlens_q, cu_seqlens_k, *longest, bounds, count, samples, impl = others
    # The seed and the route are what they are now: both live on the device, and move on there
    seed = None if seed is None else seed.clone()
    route = snapshot(count, samples)
    packing = cu_seqlens_q, cu_seqlens_k, bounds
    ctx.save_for_backward(q, k, v, *output, slopes, seed, *packing, *route)
    ctx.options = left, right, scale, softcap, dropout_p, longest, impl
    ctx.set_materialize_grads(False)  # nobody who ignores lse pays for its gradient


def differentiate(ctx, dout, dlse):
    q, k, v, out, lse, slopes, seed, cu_seqlens_q, cu_seqlens_k, bounds, *route = ctx.saved_tensors
    left, right, scale, softcap, dropout_p, longest, impl = ctx.options
    dout = torch.zeros_like(out) if dout is None else dout
    grads = flash_attention_backward_op(
        dout, dlse, q, k, v, out, lse, left, right, scale, softcap, slopes, dropout_p, seed,
        cu_seqlens_q, cu_seqlens_k, *longest, bounds, *route, impl,
    )  # fmt: skip
    return *grads, *(None,) * 15


apply = differentiable(flash_attention_op, save_for_backward, differentiate)
