"""One or more decoding steps of `tossup.causal_conv1d`, which go on from a state."""

import torch
from torch import Tensor

from ..backend import Impl, resolve_for
from ..checks import check_floating, check_shapes, check_taps
from ..routing import Route, put, take, tensors_of
from .reference import causal_conv1d_update_reference

__all__ = ["causal_conv1d_update"]


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    route: Route | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Convolve the next tokens, and put them into the state, in place.

    x: (batch, dim), one token each, or (batch, seqlen, dim).
    conv_state: (entries, state_len, dim), the last inputs, state_len >= width - 1; overwritten; any
        floating dtype and strides without overlap.
    weight: (dim, width), width 2 to 4; the last tap meets the current token. bias: (dim,), or None.
    activation: "silu", or None for none.
    cache_seqlens: int32 (batch,). Makes the state a ring of at least seqlen places: the tokens go
        to places cache_seqlens, cache_seqlens + 1, … modulo state_len. None keeps the last input in
        the last place, and shifts the others.
    conv_state_indices: int32 (batch,), distinct: the entry of each sample. A negative one is
        padding: its output is zero, and nothing is kept. None is entry n for sample n.
    route: the samples to work on. The entries of others are left as they are, and their rows of the
        result unwritten. None is all.

    Returns out, like x. Without gradients. Arithmetic is in float32, or in float64 where x is
    float64. Deterministic.
    Raises ValueError where a shape, a dtype or the activation is not as above.
    """
    check(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    routed = tensors_of(route, x.shape[0])
    chosen = resolve_for(
        impl, x, conv_state, weight, bias, cache_seqlens, conv_state_indices, *routed
    )
    tokens = x if x.ndim == 3 else x.unsqueeze(1)
    with torch.no_grad():
        if chosen == "reference":
            first, entries = (take(route, t) for t in (cache_seqlens, conv_state_indices))
            if entries is None:
                entries = take(route, torch.arange(len(x), device=x.device))
            rows = take(route, tokens)
            out = causal_conv1d_update_reference(
                rows, conv_state, weight, bias, activation, first, entries
            )
            out = put(route, out, len(x))
        else:
            from .ops import causal_conv1d_update_op

            out = causal_conv1d_update_op(
                tokens, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices,
                *routed, chosen,
            )  # fmt: skip
    return out if x.ndim == 3 else out.squeeze(1)


def check(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> None:
    if x.ndim not in (2, 3) or 0 in x.shape[1:]:
        raise ValueError(f"x must be (batch, dim) or (batch, seqlen, dim), got {tuple(x.shape)}")
    batch, dim = len(x), x.shape[-1]
    seqlen = x.shape[1] if x.ndim == 3 else 1
    check_taps(weight, dim)
    least = weight.shape[1] - 1 if cache_seqlens is None else max(weight.shape[1] - 1, seqlen)
    if conv_state.ndim != 3 or conv_state.shape[2] != dim or conv_state.shape[1] < least:
        raise ValueError(
            f"conv_state must be (entries, state_len, dim) = (entries, at least {least}, {dim}), "
            f"got {tuple(conv_state.shape)}"
        )
    if conv_state_indices is None and len(conv_state) != batch:
        raise ValueError(
            f"conv_state must have x's {batch} entries without conv_state_indices, "
            f"got {len(conv_state)}"
        )
    check_shapes(bias=(bias, (dim,)))
    check_floating(x=x, conv_state=conv_state, weight=weight, bias=bias)
    for name, tensor in (
        ("cache_seqlens", cache_seqlens),
        ("conv_state_indices", conv_state_indices),
    ):
        if tensor is not None and (tensor.shape != (batch,) or tensor.dtype != torch.int32):
            raise ValueError(
                f"{name} must be int32 ({batch},), got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
