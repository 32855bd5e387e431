"""torch.library registration: schema, shapes for tracing, gradients."""

import torch
from torch import Tensor

from ..backend import load_backend
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
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return load_backend(__package__, impl).forward(
        q, k, v, left, right, scale, cu_seqlens_q, cu_seqlens_k, count, samples
    )


@flash_attention_op.register_fake
def _(q, k, v, left, right, scale, cu_seqlens_q, cu_seqlens_k, count, samples, impl):
    lse = q.new_empty(q.shape[:-1], dtype=wide(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse.transpose(-1, -2)


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
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return load_backend(__package__, impl).backward(
        dout, dlse, q, k, v, out, lse,
        left, right, scale, cu_seqlens_q, cu_seqlens_k, count, samples,
    )  # fmt: skip


@flash_attention_backward_op.register_fake
def _(dout, dlse, q, k, v, out, lse, left, right, scale, cu_q, cu_k, count, samples, impl):
    contiguous = torch.contiguous_format
    return tuple(torch.empty_like(x, memory_format=contiguous) for x in (q, k, v))


def save_for_backward(ctx, inputs, output):
    q, k, v, left, right, scale, cu_seqlens_q, cu_seqlens_k, count, samples, impl = inputs
    route = snapshot(count, samples)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, *route)
    ctx.options = left, right, scale, impl
    ctx.set_materialize_grads(False)  # nobody who ignores lse pays for its gradient


def differentiate(ctx, dout, dlse):
    q, k, v, out, lse, *places = ctx.saved_tensors
    left, right, scale, impl = ctx.options
    dout = torch.zeros_like(out) if dout is None else dout
    grads = flash_attention_backward_op(
        dout, dlse, q, k, v, out, lse, left, right, scale, *places, impl
    )
    return *grads, *(None,) * 8


flash_attention_op.register_autograd(differentiate, setup_context=save_for_backward)
