"""Causal depthwise convolution of a few taps, as it stands before the scan in Mamba.

out[t, d] = act(bias[d] + sum over k < width of weight[d, k] x[t - (width - 1) + k, d])
"""

from typing import Literal

from torch import Tensor

from ..backend import Impl, resolve_for
from ..checks import check_floating, check_seq_idx, check_shapes, check_taps
from ..routing import Route, put, take, tensors_of
from .reference import causal_conv1d_reference

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    route: Route | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own taps along the sequence, looking only back.

    x: (batch, seqlen, dim), float16, bfloat16, float32 or float64; any strides.
    weight: (dim, width), width 2 to 4; the last tap meets the current token.
    bias: (dim,). None is zero.
    activation: "silu", or None for none.
    seq_idx: (batch, seqlen), integers, the packed sequence that each token belongs to. No tap
        reaches across a change of it; the initial state belongs to the first sequence.
    initial_state: (batch, width - 1, dim), the inputs before x. None is zeros.
    return_final_state: also return the last width - 1 inputs, reaching into the initial state where
        x is shorter. With seq_idx they are those of the last sequence, zeros before it.
    route: the samples to work on. The rows of others are left unwritten in all results and in
        gradients with a batch, and add nothing to the gradients of weight and bias. None is all.

    Returns out, like x, or (out, final_state) with final_state (batch, width - 1, dim) in x's
    dtype. All floating inputs may differ in dtype, and have gradients, which flow from the final
    state too. Arithmetic is in float32, or in float64 where x is float64. Deterministic.
    Raises ValueError where a shape, a dtype or the activation is not as above.
    """
    check(x, weight, bias, initial_state, seq_idx, activation)
    tensors = (x, weight, bias, initial_state, seq_idx)
    routed = tensors_of(route, x.shape[0])
    chosen = resolve_for(impl, *tensors, *routed)
    if chosen == "reference":
        before, index = (take(route, t) for t in (initial_state, seq_idx))
        rows = causal_conv1d_reference(take(route, x), weight, bias, before, index, activation)
        out, final_state = (put(route, r, len(x)) for r in rows)
    else:
        from .ops import apply

        out, final_state = apply(*tensors, *routed, activation, chosen)
    return (out, final_state) if return_final_state else out


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
) -> None:
    if x.ndim != 3 or x.shape[1] == 0 or not x.is_floating_point():
        raise ValueError(
            "x must be (batch, seqlen, dim), floating, with at least one token, "
            f"got {tuple(x.shape)} of {x.dtype}"
        )
    batch, seqlen, dim = x.shape
    check_taps(weight, dim)
    before = batch, weight.shape[1] - 1, dim
    check_shapes(bias=(bias, (dim,)), initial_state=(initial_state, before))
    check_floating(weight=weight, bias=bias, initial_state=initial_state)
    check_seq_idx(seq_idx, batch, seqlen)
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
