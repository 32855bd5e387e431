"""torch.library registration: schema, shapes for tracing, gradients."""

import torch
from torch import Tensor

from ..backend import call_backend
from ..library import differentiable, mutating_op
from ..precision import wide
from ..routing import snapshot

# Tokens between the states that forward keeps for backward
CHUNKS = {"cpu": 16, "triton": 32}


@torch.library.custom_op("tossup::selective_scan", mutates_args=())
def selective_scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
    delta_softplus: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the final state, and the state before every chunk."""
    return call_backend(
        __package__, impl, "forward",
        u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, count, samples, delta_softplus
    )  # fmt: skip


@selective_scan_op.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, count, samples, softplus, impl):
    batch, seqlen, dim = u.shape
    states, chunks = A.shape[1], (seqlen + CHUNKS[impl] - 1) // CHUNKS[impl]
    return (
        u.new_empty(u.shape),
        u.new_empty((batch, dim, states), dtype=wide(u.dtype)),
        u.new_empty((batch, chunks, states, dim), dtype=wide(u.dtype)),
    )


@torch.library.custom_op("tossup::selective_scan_backward", mutates_args=())
def selective_scan_backward_op(
    dout: Tensor,
    dfinal_state: Tensor | None,
    kept: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
    delta_softplus: bool,
    impl: str,
) -> list[Tensor]:
    """The gradients of u to initial_state, empty for those that are None."""
    gradients = call_backend(
        __package__, impl, "backward",
        dout, dfinal_state, kept,
        u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, count, samples, delta_softplus,
    )  # fmt: skip
    return [dout.new_empty(0) if gradient is None else gradient for gradient in gradients]


@selective_scan_backward_op.register_fake
def _(dout, dfinal_state, kept, *inputs):
    differentiable = inputs[:9]
    return [dout.new_empty(0) if x is None else x.new_empty(x.shape) for x in differentiable]


@mutating_op("selective_scan_into", mutates_args=("out", "kept"))
def selective_scan_into_op(
    out: Tensor,
    kept: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    seq_idx: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
    delta_softplus: bool,
    impl: str,
) -> None:
    """The forward pass into given memory, in which each sample's part is contiguous."""
    call_backend(
        __package__, impl, "forward",
        u, delta, A, B, C, D, z, delta_bias, None, seq_idx, count, samples, delta_softplus,
        (out, kept),
    )  # fmt: skip


@mutating_op("selective_scan_backward_into", mutates_args=("dB", "dC", "dz"))
def selective_scan_backward_into_op(
    dB: Tensor,
    dC: Tensor,
    dz: Tensor | None,
    dout: Tensor,
    kept: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    seq_idx: Tensor | None,
    count: Tensor | None,
    samples: Tensor | None,
    delta_softplus: bool,
    impl: str,
) -> list[Tensor]:
    """The gradients of u, delta, A, D and delta_bias, empty for those that are None; those of B, C
    and z go into given memory of any strides."""
    du, ddelta, dA, _, _, dD, _, dbias, _ = call_backend(
        __package__, impl, "backward",
        dout, None, kept, u, delta, A, B, C, D, z, delta_bias, None, seq_idx, count, samples,
        delta_softplus, (dB, dC, dz),
    )  # fmt: skip
    gradients = du, ddelta, dA, dD, dbias
    return [dout.new_empty(0) if gradient is None else gradient for gradient in gradients]


@selective_scan_backward_into_op.register_fake
def _(dB, dC, dz, dout, kept, u, delta, A, B, C, D, z, delta_bias, *others):
    inputs = u, delta, A, D, delta_bias
    return [dout.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs]


def save_for_backward(ctx, inputs, output):
    *tensors, count, samples, delta_softplus, impl = inputs
    ctx.save_for_backward(output[2], *tensors, *snapshot(count, samples))
    ctx.delta_softplus, ctx.impl = delta_softplus, impl
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def differentiate(ctx, dout, dfinal_state, _dkept):
    kept, *inputs = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(inputs[0])
    gradients = selective_scan_backward_op(
        dout, dfinal_state, kept, *inputs, ctx.delta_softplus, ctx.impl
    )
    present = (g if x is not None else None for g, x in zip(gradients, inputs, strict=False))
    return *present, None, None, None, None, None


apply = differentiable(selective_scan_op, save_for_backward, differentiate)
