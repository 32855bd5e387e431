"""flash-attn's helpers that pack padded batches, in plain torch.

Which tokens a mask keeps is read on the host, as upstream does: the packed length is a shape.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices], differentiable. indices: distinct integers (n,)."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros (first_axis_dim, …) with values at the distinct indices. Differentiable."""
    zeros = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return zeros.index_copy(0, indices.long(), values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """input[indices], and input itself."""
    return input.index_select(0, indices), input


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens that a mask keeps.

    hidden_states: (batch, seqlen, …). attention_mask: (batch, seqlen), bool or 0 and 1.
    unused_mask: (batch, seqlen), tokens that are kept, but do not count as used.

    Returns the kept tokens (total, …), their indices into batch · seqlen, cu_seqlens int32
    (batch + 1,), the longest kept length, and the used lengths, int32 (batch,).
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    used = attention_mask.sum(-1, dtype=torch.int32)
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, bounds(lengths), int(lengths.max()), used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack rows that each hold several sequences one after the other.

    attention_mask_in_length: integers (batch, seqlen): each row lists its sequences' lengths, with
        zeros wherever there is none.

    Returns the kept tokens (total, …), their indices into batch · seqlen, cu_seqlens int32
    (sequences + 1,), and the longest length.
    """
    seqlen = attention_mask_in_length.shape[1]
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    place = torch.arange(seqlen, device=lengths.device)
    kept = place < attention_mask_in_length.sum(-1, keepdim=True)
    indices = kept.flatten().nonzero().flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, bounds(lengths), int(lengths.max())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Packed tokens (total, …) back to (batch, seqlen, …), zeros elsewhere."""
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))


def bounds(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
