"""causal-conv1d's functions on Tossup's ops.

Layouts are upstream's, (batch, dim, seqlen); what passes through is transposed as a view, so
nothing is copied in either layout; results lie in memory with channels last, whatever the inputs
do. Where upstream refuses a combination that our ops know (a final state in a channel-first layout
or with seq_idx, other dtypes), it runs here.
"""

from typing import Literal

import torch
from torch import Tensor

from ..causal_conv1d import causal_conv1d
from ..causal_conv1d_update import causal_conv1d_update as update_op
from ..checks import check_shapes, check_taps

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution, as `tossup.causal_conv1d`.

    x: (batch, dim, seqlen), any strides. weight: (dim, width), width 2 to 4. bias: (dim,).
    seq_idx: (batch, seqlen), integers: the packed sequence of each token, which ends wherever it
        changes; upstream lets one go on that comes back within the width. Tokens with a negative
        one are padding, and give zeros.
    initial_states: (batch, dim, width - 1), the inputs before x. Differentiable.
    return_final_states: return (out, final_states) instead of out, final_states (batch, dim,
        width - 1), channels contiguous. Differentiable.
    final_states_out: memory for final_states, where they are returned; it is what is returned,
        unless gradients go through that.
    activation: None, or "silu" or "swish", which are one.

    Returns out, like x. Raises NotImplementedError for other activations, and ValueError where a
    shape or a dtype is not as above.
    """
    check_sequences("x", x)
    check_taps(weight, x.shape[1])
    before = (*x.shape[:2], weight.shape[1] - 1)
    check_shapes(
        initial_states=(initial_states, before), final_states_out=(final_states_out, before)
    )
    result = causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        activation=own_activation(activation),
        seq_idx=seq_idx,
        initial_state=None if initial_states is None else initial_states.transpose(1, 2),
        return_final_state=return_final_states,
    )
    out, final_states = result if isinstance(result, tuple) else (result, None)
    out = out.transpose(1, 2)
    if seq_idx is not None:
        out = out.masked_fill((seq_idx < 0).unsqueeze(1), 0)
    if final_states is None:
        return out
    final_states = final_states.transpose(1, 2)
    if final_states_out is not None:
        # The caller's buffer shall not carry this call's graph into the next one
        with torch.no_grad():
            final_states_out.copy_(final_states)
        if not final_states.requires_grad:
            final_states = final_states_out
    return out, final_states


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """One or several steps of the convolution on a state that is updated in place.

    x: (batch, dim), or (batch, dim, seqlen). weight: (dim, width), width 2 to 4. bias: (dim,).
    conv_state: (entries, dim, state_len), the last inputs, with state_len >= width - 1.
    activation: None, or "silu" or "swish", which are one.
    cache_seqlens: int32 (batch,). Makes the state a ring: x is written at cache_seqlens modulo
        state_len. None shifts the state to the left.
    conv_state_indices: int32 (batch,): the entry of each sample; a negative one is padding, whose
        output is zero. None is entry n for sample n.

    Returns out, like x. Without gradients. Raises NotImplementedError for other activations, and
    ValueError where a shape or a dtype is not as above.
    """
    check_update(x, conv_state, weight, cache_seqlens)
    out = update_op(
        x if x.ndim == 2 else x.transpose(1, 2),
        conv_state.transpose(1, 2),
        weight,
        bias,
        activation=own_activation(activation),
        cache_seqlens=cache_seqlens,
        conv_state_indices=conv_state_indices,
    )
    return out if x.ndim == 2 else out.transpose(1, 2)


def check_sequences(name: str, x: Tensor) -> None:
    """In upstream's layout, as all checks here: the op's own would speak of another."""
    if x.ndim != 3 or 0 in x.shape[1:] or not x.is_floating_point():
        raise ValueError(
            f"{name} must be (batch, dim, seqlen), floating, with at least one token, "
            f"got {tuple(x.shape)} of {x.dtype}"
        )


def check_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, cache_seqlens: Tensor | None
) -> None:
    if x.ndim not in (2, 3) or 0 in x.shape[1:]:
        raise ValueError(f"x must be (batch, dim) or (batch, dim, seqlen), got {tuple(x.shape)}")
    dim = x.shape[1]
    check_taps(weight, dim)
    tokens = 1 if x.ndim == 2 else x.shape[2]
    least = weight.shape[1] - 1 if cache_seqlens is None else max(weight.shape[1] - 1, tokens)
    if conv_state.ndim != 3 or conv_state.shape[1] != dim or conv_state.shape[2] < least:
        raise ValueError(
            f"conv_state must be (entries, dim, state_len) = (entries, {dim}, at least {least}), "
            f"got {tuple(conv_state.shape)}"
        )


def own_activation(activation: str | None) -> Literal["silu"] | None:
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    return None if activation is None else "silu"
